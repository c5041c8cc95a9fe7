"""What the hosts of a run answer before it starts, by an `ssh` that stays on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from gearshift.errors import UserError
from gearshift.launch import hosts, launcher
from gearshift.launch.config import load
from gearshift.launch.hosts import SeveralHosts, end_ranks, first_address, ssh_words
from gearshift.launch.overrides import parse_arguments

from . import fake_ssh
from .conftest import example, write


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


def test_what_is_typed_to_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-o 'A=b c'")
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
    assert ssh_words("a", "2222", "true") == ["ssh", *options, "-p", "2222", "-o", "A=b c", "a", "true"]
    assert ssh_words("a", None, "true") == ["ssh", *options, "-o", "A=b c", "a", "true"]


def test_the_ranks_of_a_run_end_and_no_others() -> None:
    """By the address and the port of their rank 0, also one that takes no SIGTERM; `bare` was reached."""
    with ExitStack() as stack:

        def rank(address: str, port: str, signals: str = "") -> subprocess.Popen[bytes]:
            variables = {**os.environ, "MASTER_ADDR": address, "MASTER_PORT": port}
            words = ["sh", "-c", f"{signals} echo; read line"]
            process = subprocess.Popen(words, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.callback(process.communicate)
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
            return process

        ended = [rank("10.9.9.9", "1234"), rank("10.9.9.9", "1234", "trap '' TERM;")]
        others = [rank("10.9.9.9", "1235"), rank("10.9.9.8", "1234")]
        assert end_ranks(["other", "gone", "bare"], None, "10.9.9.9", 1234) == ["gone"]
        assert all(process.wait(10) < 0 for process in ended)
        assert [process.poll() for process in others] == [None, None]


@pytest.mark.parametrize("saves", [True, False])
def test_a_run_over_hosts_is_asked_through_a_file(tmp_path: Path, saves: bool) -> None:
    process: Any = None
    job = SeveralHosts(tmp_path / "run", saves, ["a"], None, "a", 1, by_ssh=True)
    assert job.ask_to_save(process) is saves
    assert (tmp_path / "run/stop").exists() is saves


@pytest.mark.parametrize("name", ["pdsh", "openmpi", "slurm"])
def test_a_start_over_hosts(here: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Slurm's hosts are not asked; ranks that pdsh has started are ended by ssh, and a lost connection is noticed."""
    started: list[Any] = []
    monkeypatch.delenv("PDSH_SSH_ARGS_APPEND", raising=False)
    monkeypatch.setattr(launcher, "run_to_end", lambda *all: started.append(all) or 0)
    monkeypatch.setattr(hosts, "first_address", lambda names, ssh_port, port: ("10.0.0.1", port or 4321))
    arguments = parse_arguments([write(example("ppo")), "--hostfile", "hosts", "--launcher", name])
    config = load("ppo", "config.yaml", [("run.hang_seconds", "90")])
    assert launcher._run_on_hosts("ppo", arguments, config, ["a", "b"]) == 0
    _, environment, job = started[0]
    expected = ("a", 29500) if name == "slurm" else ("10.0.0.1", 4321)
    assert (job.address, job.port) == expected
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == (expected[0], str(expected[1]))
    assert job.by_ssh is (name == "pdsh")
    alive = "-o ServerAliveInterval=30 -o ServerAliveCountMax=3" if name == "pdsh" else None
    assert environment.get("PDSH_SSH_ARGS_APPEND") == alive
