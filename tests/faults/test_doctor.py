"""`gearshift doctor` with the real launcher: on this machine, and on two hosts that are name spaces of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .hosts import ROOT, Host, missing, two_hosts

several = pytest.mark.skipif(bool(missing()), reason=missing())


def doctor(folder: Path, *words: str, host: Host | None = None) -> tuple[int, list[str]]:
    """Exit code and lines, typed on `host` or on this machine itself."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "DS_ACCELERATOR": "cpu"}
    typed = [sys.executable, "-m", "gearshift.launch", "doctor", *words]
    typed = host.words(*typed, folder=folder) if host else typed
    done = subprocess.run(typed, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=400)
    print(done.stdout, done.stderr)  # where a test fails
    return done.returncode, done.stdout.splitlines()


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hosts").write_text("gear-a slots=1\ngear-b slots=1\n")
    (tmp_path / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    return tmp_path


def test_this_machine(tmp_path: Path) -> None:
    shared = set(os.listdir("/dev/shm"))
    code, lines = doctor(tmp_path)
    assert code == 0
    assert lines[-2].startswith("ok    all-reduce        2 ranks over gloo, 4 MB in ")
    assert set(os.listdir("/dev/shm")) <= shared


@several
def test_two_hosts(hosts: tuple[Host, Host], folder: Path) -> None:
    code, lines = doctor(folder, "--hostfile", "hosts", "--run-folder", "runs", host=hosts[0])
    assert code == 0
    assert "ok    gear-a            reaches gear-b through eth0" in lines
    assert "ok    gear-b            reaches gear-a through eth0" in lines
    assert lines[-2].startswith("ok    all-reduce        2 ranks over gloo, 4 MB in ")
    for host in hosts:
        assert host.pythons() == []


@several
def test_a_host_with_other_code_and_a_folder_of_its_own(hosts: tuple[Host, Host], folder: Path) -> None:
    """gear-b has another file of the package, and does not see gear-a's run folder."""
    other, runs, empty = folder / "other.py", folder / "runs", folder / "empty"
    other.write_text((ROOT / "gearshift/errors.py").read_text() + "# edited\n")
    runs.mkdir()
    empty.mkdir()
    with hosts[1].replaced(ROOT / "gearshift/errors.py", other), hosts[1].replaced(runs, empty):
        code, lines = doctor(folder, "--hostfile", "hosts", host=hosts[0])
    assert code == 1
    wrong = [line for line in lines if line.startswith("WRONG")]
    assert [line.split()[1] for line in wrong] == ["gear-b"] * 2
    assert "code of gearshift" in wrong[0]
    assert "does not see the run folder" in wrong[1]
    for host in hosts:
        assert host.pythons() == []


@several
def test_a_host_that_is_cut_off(hosts: tuple[Host, Host], folder: Path) -> None:
    hosts[1].cable("down")
    try:
        code, lines = doctor(folder, "--hostfile", "hosts", host=hosts[0])
    finally:
        hosts[1].cable("up")
    assert code == 1
    assert [line for line in lines if line.startswith("WRONG gear-b            ssh: ")]
    assert "note  all-reduce        not tried: mend what is WRONG first" in lines
