"""What the hosts of a run answer before it starts, by an `ssh` that stays on this machine."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from gearshift.errors import UserError
from gearshift.launch.hosts import first_address

from . import fake_ssh


@pytest.fixture(autouse=True)
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{fake_ssh.write(tmp_path / 'bin')}:{os.environ['PATH']}")


def test_a_login_shell_may_say_something_first() -> None:
    address, port = first_address(["chatty", "other"], None, 0)
    assert address != "Welcome"
    assert 0 < port < 65536
    with socket.socket() as free:
        free.bind(("", port))


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^port {port} of chatty is in use by another program"):
            first_address(["chatty"], None, port)


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("gone", r"^gone cannot be reached by ssh \(without a password\): .*Connection refused"),
        ("bare", r"^bare cannot start .* which every host needs: .*not found"),
    ],
)
def test_a_host_that_cannot_take_part(host: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        first_address(["other", host], None, 0)
