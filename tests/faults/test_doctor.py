"""`gearshift doctor` with the real launcher: on this machine, and over two hosts that are both it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import fake_ssh


def doctor(folder: Path, *words: str) -> tuple[int, list[str]]:
    environment = {**os.environ, "PATH": f"{fake_ssh.write(folder / 'bin')}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "gearshift.launch.cli", "doctor", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=500
    )
    print(done.stdout, done.stderr)  # where a test fails
    return done.returncode, done.stdout.splitlines()


def test_this_machine(tmp_path: Path) -> None:
    shared = set(os.listdir("/dev/shm"))
    code, lines = doctor(tmp_path)
    assert code == 0, lines
    assert lines[-2].startswith("ok    all-reduce        2 ranks over gloo, 4 MB in ")
    assert set(os.listdir("/dev/shm")) <= shared


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="DeepSpeed's launcher needs pdsh: apt install pdsh")
def test_two_hosts(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=lo\n")
    (tmp_path / "hosts").write_text("alpha slots=1\nbeta slots=1\n")
    code, lines = doctor(tmp_path, "--hostfile", "hosts")
    assert code == 0, lines
    assert lines[-2].startswith("ok    all-reduce        2 ranks over gloo, 4 MB in ")
