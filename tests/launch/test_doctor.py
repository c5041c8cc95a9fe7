"""What `gearshift doctor` makes of what it finds, and that it finds it on this machine and on hosts behind an ssh."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from gearshift.launch.cli import main
from gearshift.launch.doctor import all_reduce, devices, hosts, machine, software
from gearshift.launch.doctor.all_reduce import cause_in, sum_finding
from gearshift.launch.doctor.findings import NOTE, OK, WRONG, Finding
from gearshift.launch.doctor.probe import connect, interfaces
from gearshift.launch.joining import facts_of
from gearshift.launch.overrides import Arguments

from . import fake_ssh

GIB = 1 << 30


def test_a_line_says_what_was_found_and_what_to_do() -> None:
    assert Finding(OK, "torch", "2.13.0").line() == "ok    torch             2.13.0"
    assert Finding(WRONG, "torch", "is not installed", "pip install torch").line() == (
        "WRONG torch             is not installed: pip install torch"
    )


@pytest.mark.parametrize(
    ("requirement", "version", "extra", "level", "to_do"),
    [
        ("torch>=2.11", "2.13.0+cpu", None, OK, ""),
        ("torch>=2.11", "2.9.1", None, WRONG, 'pip install "torch>=2.11"'),
        ("numpy", None, None, WRONG, 'pip install "numpy"'),
        ("peft>=0.18", None, "lora", NOTE, 'only for adapters (policy.lora): pip install "gearshift[lora]"'),
        ("peft>=0.18", "0.17", "lora", NOTE, 'adapters (policy.lora) needs it: pip install "peft>=0.18"'),
    ],
)
def test_packages(requirement: str, version: str | None, extra: str | None, level: str, to_do: str) -> None:
    found = software.package_finding(Requirement(requirement), version, extra)
    assert (found.level, found.to_do) == (level, to_do)


def test_python() -> None:
    assert software.python_finding((3, 11, 7), "python").level == OK
    assert software.python_finding((3, 10, 1), "python").level == WRONG


@pytest.mark.parametrize(("age", "level"), [(60, NOTE), (7200, WRONG)])
def test_a_lock_of_a_build(age: float, level: str) -> None:
    assert software.lock_finding(Path("x/lock"), age).level == level


def test_locks_are_looked_for_where_torch_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "py311/cpu_adam").mkdir(parents=True)
    lock = tmp_path / "py311/cpu_adam/lock"
    lock.touch()
    os.utime(lock, (time.time() - 7200,) * 2)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert [(found.what, found.level) for found in software.lock_findings()] == [("build lock", WRONG)]
    lock.unlink()
    assert not list(software.lock_findings())


def test_what_hosts_have_alike() -> None:
    """The doctor compares what a run does: versions, and every file of the package, here as one digest."""
    shown = facts_of(None)
    found = software.versions()
    assert {name: shown[name] for name in ("Python", "gearshift", "torch", "tokenizers")}.items() <= found.items()
    assert "the SHA-256 of gearshift/launch/joining.py" in shown


@pytest.mark.parametrize("change", ["text", "name"])
def test_other_code_has_another_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    (tmp_path / "a.py").write_text("one")
    monkeypatch.setattr("gearshift.__file__", str(tmp_path / "__init__.py"))
    before = software.versions()["code of gearshift"]
    assert software.versions()["code of gearshift"] == before
    (tmp_path / "a.py").write_text("two") if change == "text" else (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert software.versions()["code of gearshift"] != before


@pytest.mark.parametrize(
    ("free", "writable", "level"), [(60 * GIB, True, OK), (GIB, True, NOTE), (10**7, True, WRONG), (GIB, False, WRONG)]
)
def test_room_on_a_disk(free: int, writable: bool, level: str) -> None:
    assert machine.room_finding("run folder", Path("runs"), free, writable, 50 * GIB, "use").level == level


@pytest.mark.parametrize(("free", "level"), [(8 * GIB, OK), (64 << 20, WRONG), (GIB // 2, NOTE)])
def test_shared_memory(free: int, level: str) -> None:
    """Docker's 64 MB are too few for NCCL."""
    assert machine.shared_memory_finding(free, free).level == level


@pytest.mark.parametrize(("soft", "level"), [(resource.RLIM_INFINITY, OK), (65536, OK), (1024, NOTE), (100, WRONG)])
def test_open_files(soft: int, level: str) -> None:
    assert machine.open_files_finding(soft).level == level


@pytest.mark.parametrize(
    ("asked", "cores", "quota", "ranks", "level", "words"),
    [
        (None, 8, None, 2, OK, "here 4"),
        (None, 64, 4.0, 2, NOTE, "export OMP_NUM_THREADS=2"),
        ("4", 8, None, 2, OK, "OMP_NUM_THREADS=4"),
        ("8", 8, None, 2, NOTE, "unset it, or 4"),
        ("many", 8, None, 2, WRONG, "unset it"),
    ],
)
def test_threads(asked: str | None, cores: int, quota: float | None, ranks: int, level: str, words: str) -> None:
    found = machine.threads_finding(asked, cores, quota, ranks)
    assert found.level == level
    assert words in found.line()


@pytest.mark.parametrize(
    ("seen", "usable", "built_for", "level"),
    [(0, 0, None, NOTE), (8, 8, "12.8", OK), (8, 0, None, WRONG), (8, 0, "12.8", WRONG), (8, 4, "12.8", WRONG)],
)
def test_devices(seen: int, usable: int, built_for: str | None, level: str) -> None:
    assert devices.devices_finding(seen, usable, built_for).level == level


def test_a_gpu_that_others_use_and_backends() -> None:
    assert devices.memory_finding(0, "H100", 70 * GIB, 80 * GIB).level == OK
    assert devices.memory_finding(0, "H100", 20 * GIB, 80 * GIB).level == NOTE
    levels = [[f.level for f in devices.backend_findings(*asked)] for asked in [
        (0, True, False, True), (8, True, False, True), (8, True, True, True), (0, False, False, False)
    ]]  # fmt: skip
    assert levels == [[OK], [WRONG], [OK], [WRONG]]


def test_a_sum_over_ranks() -> None:
    told = {"ranks": 4, "backend": "gloo", "sum": 10.0, "seconds": 0.01}
    assert sum_finding(told, 4).found == "4 ranks over gloo, 4 MB in 10.0 ms"
    assert sum_finding({**told, "sum": 6.0}, 4).level == WRONG
    assert sum_finding({**told, "ranks": 2}, 4).level == WRONG
    said = (
        "[INFO] x\nbeta: torch.DistNetworkError: port: 29500, EADDRINUSE\npdsh@vm: beta: ssh exited with exit code 1\n"
    )
    assert cause_in(said) == "beta: torch.DistNetworkError: port: 29500, EADDRINUSE"
    assert cause_in("sh: no deepspeed\npdsh@vm: beta: ssh exited with exit code 1\n") == "sh: no deepspeed"


# --- hosts -----------------------------------------------------------------------------------------------------------

HERE = {"python": "3.11.7", "torch": "2.13.0", "code of gearshift": "abc"}
FACTS: dict[str, Any] = {
    "versions": HERE, "gpus": 0, "findings": [], "sees_token": True, "port": 5000,
    "interfaces": {"lo": "127.0.0.1", "eth0": "10.0.0.1"}, "address": "10.0.0.1",
}  # fmt: skip


def found_of(settings: dict[str, str] | None = None, ranks: int = 2, **changes: Any) -> list[tuple[str, str]]:
    facts = {**FACTS, **changes}
    return [(f.level, f.line()) for f in hosts.host_findings("b", facts, ranks, HERE, settings or {}, 2)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"versions": {**HERE, "torch": "2.9.0"}}, "torch 2.9.0, here 2.13.0: install the same on every host"),
        ({"versions": {**HERE, "code of gearshift": "xyz"}}, "code of gearshift xyz, here abc"),
        ({"versions": {"python": "3.11.7", "code of gearshift": "abc"}}, "torch none, here 2.13.0"),
        ({"gpus": 1}, "slots=2, but 1 GPUs are visible there"),
        ({"sees_token": False}, "does not see the run folder"),
        ({"findings": [vars(Finding(WRONG, "open files", "100", "ulimit"))]}, "open files: 100: ulimit"),
    ],
)
def test_what_would_break_a_run_over_hosts(changes: dict[str, Any], words: str) -> None:
    wrong = [line for level, line in found_of(**changes) if level == WRONG]
    assert len(wrong) == 1
    assert words in wrong[0]


def test_hosts_that_are_alike() -> None:
    assert [level for level, _ in found_of()] == [OK, OK]
    assert [level for level, _ in found_of({"GLOO_SOCKET_IFNAME": "eth0"})] == [OK, OK]
    assert [level for level, _ in found_of({"GLOO_SOCKET_IFNAME": "ib0"})] == [OK, WRONG]
    assert [level for level, _ in found_of({"NCCL_SOCKET_IFNAME": "eth"}, gpus=2)] == [OK, OK]
    several = {"eth0": "10.0.0.1", "ib0": "10.1.0.1"}
    assert [level for level, _ in found_of(interfaces=several)] == [OK, NOTE]


def test_settings_that_the_launcher_passes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's from the environment, both from .deepspeed_env; gloo's from the environment it drops."""
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    assert hosts.interface_settings() == {"NCCL_SOCKET_IFNAME": "eth1"}
    Path(".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nOTHER=1\n")
    assert hosts.interface_settings() == {"NCCL_SOCKET_IFNAME": "eth1", "GLOO_SOCKET_IFNAME": "eth0"}


@pytest.mark.parametrize(("skew", "uncertain", "level"), [(0.3, 0.1, OK), (-30.0, 0.1, NOTE), (3.0, 2.5, OK)])
def test_clocks(skew: float, uncertain: float, level: str) -> None:
    assert hosts.clock_finding("b", skew, uncertain).level == level


def test_connections_between_hosts() -> None:
    facts = {name: {**FACTS, "address": f"10.0.0.{n}"} for n, name in enumerate("abc", 1)}
    answers = {"a": {"from": "10.0.0.1"}, "b": {"from": "10.0.0.1"}, "c": {"error": "timed out"}}
    assert [f.line() for f in hosts.connection_findings("a", facts, answers)] == [
        "WRONG a                 does not reach c (10.0.0.3, TCP): timed out: ranks connect to each other on any port: "
        "open the firewall between the hosts",
        "ok    a                 reaches b through eth0",
    ]


def test_a_port_that_nobody_listens_on() -> None:
    assert connect("127.0.0.1", 1) == {"error": "Connection refused"}
    assert interfaces()["lo"] == "127.0.0.1"


# --- through the command line ----------------------------------------------------------------------------------------


def test_this_machine_is_fit(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok    ", "note  ")) for line in lines[:-1])
    assert lines[-1].startswith("0 would break a run, ")
    for what in ("python", "torch", "deepspeed", "devices", "backends", "C library", "run folder", "open files"):
        assert any(line[6:].startswith(what) for line in lines), what


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--include", "a"], "--include is for several hosts: give --hostfile HOSTS with it"),
        (["--hostfile", "hosts", "--master_port", "many"], "--master_port: should be a port, 1 to 65535, not 'many'"),
    ],
)
def test_options_of_the_launcher_are_checked_as_for_a_run(
    capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(["doctor", "--quick", *words]) == 2
    assert capsys.readouterr() == ("", f"gearshift doctor: {says}\n")


def test_a_sum_that_cannot_be_started_is_a_finding(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{fake_ssh.write(here / 'bin')}:{os.environ['PATH']}")
    found = all_reduce.finding(Arguments(hostfile="hosts"), ["gone"], 1, [])
    assert found.line().startswith("WRONG all-reduce        not started: gone cannot be reached by ssh")


def test_hosts_behind_ssh(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Three that answer, one that refuses, one without Python: each named, nothing left, and the exit code tells."""
    monkeypatch.setenv("PATH", f"{fake_ssh.write(here / 'bin')}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(here))
    Path("hosts").write_text(
        "chatty slots=1\nalpha slots=1\nbeta slots=1\ngone slots=1\nbare slots=1\nleft-out slots=1\n"
    )
    before = set(here.iterdir())
    assert main(["doctor", "--quick", "--hostfile", "hosts", "--exclude", "left-out"]) == 1
    lines = capsys.readouterr().out.splitlines()
    for host, others in (("alpha", "chatty, beta"), ("beta", "chatty, alpha")):
        of_host = [line for line in lines if line[6:].startswith(host)]
        assert f"ok    {host:<18}reached by ssh; the same versions and code as here" in of_host
        assert any(f"reaches {others} through " in line for line in of_host)
        assert any(line.startswith(f"ok    {host:<18}clock ") for line in of_host)
    assert any(line.startswith("WRONG gone              ssh: ssh: connect to host gone port 22") for line in lines)
    assert any(line.startswith("WRONG chatty            its shell prints 'Welcome' before") for line in lines)
    assert any(line.startswith("WRONG bare              the probe ended with exit code 127") for line in lines)
    assert "note  all-reduce        not tried: mend what is WRONG first" in lines
    assert lines[-1].startswith("3 would break a run, ")
    assert set(here.iterdir()) == before
