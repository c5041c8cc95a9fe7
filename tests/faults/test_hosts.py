"""`gearshift ppo --hostfile`: DeepSpeed's launcher, pdsh and ssh, on two hosts that are name spaces of this machine.

What they compute, what is said when one cannot start, what happens when one is cut off; and that nothing is left.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from gearshift.launch.processes import PAUSED
from tests.rlhf.test_resuming import BATCH
from tests.rlhf.tiny import changed

from .hosts import ROOT, Host, missing, two_hosts
from .runs import small_run

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

ITERATIONS, HANG_SECONDS = 3, 10
SETTINGS = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
ONE_RANK_EACH = ("--include", "gear-a:0@gear-b:0", "--rollout.tp_size", "1")


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every command runs: config, hostfile, .deepspeed_env, data and models."""
    folder = tmp_path_factory.mktemp("several")
    values = changed(small_run(folder), run={"hang_seconds": HANG_SECONDS}, ppo={"episodes": ITERATIONS * BATCH})
    (folder / "ppo.yaml").write_text(yaml.safe_dump(values))
    (folder / "hosts").write_text("gear-a slots=2\ngear-b slots=2\n")
    settings = "".join(f"{name}={value}\n" for name, value in SETTINGS.items())
    (folder / ".deepspeed_env").write_text(f"{settings}GLOO_SOCKET_IFNAME=eth0\n")
    (folder / ".without_gloo").write_text(settings)
    return folder


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
    return {**os.environ, **SETTINGS, "PYTHONPATH": str(ROOT), "PATH": path}


def gearshift(folder: Path, run: str, *words: str) -> list[str]:
    typed = [sys.executable, "-m", "gearshift.launch", "ppo", "ppo.yaml", "--run.folder", str(folder / run), *words]
    return typed if "--hostfile" in words or "--run.ranks" in words else [*typed, "--hostfile", "hosts"]


def deepspeed(folder: Path, run: str, *words: str) -> list[str]:
    stage = ["--module", "gearshift.launch.ppo", "--config", "ppo.yaml", "--run.folder", str(folder / run)]
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "hosts", *words, *stage]


def finished(folder: Path, words: list[str], host: Host | None = None) -> tuple[int, str, float]:
    """Exit code, what was said by us, and seconds."""
    started = time.monotonic()
    words = host.words(*words, folder=folder) if host else words
    done = subprocess.run(words, env=environment(), cwd=folder, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - started


@contextmanager
def going(
    folder: Path, run: str, host: Host, *words: str, until: str = "metrics.jsonl", **variables: str
) -> Iterator[subprocess.Popen[str]]:
    """A run that has one iteration behind it: there is something in the file `until`."""
    command = host.words(*gearshift(folder, run, *words), folder=folder)
    pipe = subprocess.PIPE
    settings = {**environment(), **variables}
    with subprocess.Popen(command, env=settings, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 200
        file = folder / run / until
        while not file.is_file() or not file.read_text().strip():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process


def losses(run: Path) -> list[dict[str, float]]:
    """What training computed, iteration by iteration."""
    names = ("loss/", "objective/", "policy/", "value/", "kl/")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name.startswith(names)} for row in rows]


def assert_nothing_left(hosts: tuple[Host, Host], seconds: float = 0.0) -> None:
    deadline = time.monotonic() + seconds
    while any(host.pythons() for host in hosts) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [host.pythons() for host in hosts] == [[], []]
    shared = [host.run("ls", "/dev/shm").split() for host in hosts]
    assert shared == [[], []]


@pytest.fixture(scope="module")
def whole(hosts: tuple[Host, Host], folder: Path) -> tuple[Path, str]:
    code, told, _ = finished(folder, gearshift(folder, "whole"), hosts[0])
    assert code == 0, told
    assert_nothing_left(hosts)
    return folder / "whole", told


def test_two_hosts_compute_what_one_does(whole: tuple[Path, str], folder: Path) -> None:
    """PPO-ptx on 2 hosts x 2 ranks, TP 2 inside a host, against 4 ranks of one host."""
    run, told = whole
    assert "gear-a  0 to 1  0               0 to 3 (all)" in told
    assert "gear-b  2 to 3  1               0 to 3 (all)" in told
    code, said, _ = finished(folder, gearshift(folder, "one", "--run.ranks", "4"))
    assert code == 0, said
    ours, theirs = losses(run), losses(folder / "one")
    assert len(ours) == len(theirs) == ITERATIONS
    assert {"loss/policy_avg", "loss/value_avg", "loss/ptx_avg"} <= set(ours[0])
    for found, expected in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, rel=2e-4, abs=2e-5)


def test_a_host_that_is_cut_off(hosts: tuple[Host, Host], whole: tuple[Path, str], folder: Path) -> None:
    """The job ends, naming the host; on the host, which nobody reaches, too. It goes on when the host is back."""
    here, there = hosts
    with going(folder, "cut", here, until="checkpoints/latest") as process:
        there.cable("down")
        since = time.monotonic()
        told, _ = process.communicate(timeout=100)
    assert process.returncode not in (0, None)
    assert time.monotonic() - since < 4 * HANG_SECONDS + 20
    lines = [line for line in told.splitlines() if "the run ends here" in line]
    assert len(lines) == 1, told
    assert "gear-b (ranks 2 to 3) has stopped or is cut off in" in lines[0]
    assert "Traceback" not in told
    assert_nothing_left(hosts, seconds=30)
    there.cable("up")
    code, told, _ = finished(folder, [*deepspeed(folder, "cut"), "--resume", "auto"], here)
    assert code == 0, told
    assert "steps done" in told
    assert without_clocks(folder / "cut") == without_clocks(whole[0])


def without_clocks(run: Path) -> list[dict[str, Any]]:
    timed = ("timing/", "throughput/", "memory/", "time")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]


def test_a_signal_asks_the_ranks_of_all_hosts_to_save(hosts: tuple[Host, Host], folder: Path) -> None:
    """Also where nobody names gloo's network card: on Debian, as here, the host's own name leads to the loopback."""
    words = (*ONE_RANK_EACH, "--ppo.episodes", str(50 * BATCH), "--checkpoint.every", "50")
    with going(folder, "signal", hosts[0], *words, DS_ENV_FILE=".without_gloo") as process:
        shell = hosts[0].find("gearshift.launch ppo")
        hosts[0].run("kill", f"-{int(signal.SIGTERM)}", str(shell))
        told, _ = process.communicate(timeout=100)
    assert process.returncode == PAUSED, told
    assert told.count("at SIGTERM: go on with --resume auto") == 1
    assert not (folder / "signal/stop").exists()
    assert list((folder / "signal/checkpoints").glob("step-*"))
    assert_nothing_left(hosts)


def test_ctrl_c_ends_the_ranks_of_all_hosts(hosts: tuple[Host, Host], folder: Path) -> None:
    with going(folder, "break", hosts[0], *ONE_RANK_EACH, "--ppo.episodes", str(50 * BATCH)) as process:
        hosts[0].run("kill", f"-{int(signal.SIGINT)}", str(hosts[0].find("gearshift.launch ppo")))
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert_nothing_left(hosts)


def test_a_rank_that_is_killed_on_another_host(hosts: tuple[Host, Host], folder: Path) -> None:
    """The others see a broken connection; one line says whose it was."""
    with going(folder, "killed", hosts[0], *ONE_RANK_EACH, "--ppo.episodes", str(50 * BATCH)) as process:
        hosts[1].run("kill", "-KILL", str(hosts[1].find("--local_rank=0")))
        told, _ = process.communicate(timeout=100)
    assert process.returncode == 256 - signal.SIGKILL
    assert "Traceback" not in told
    lines = [line for line in told.splitlines() if "the run ends here" in line]
    assert len(lines) == 1, told
    assert "rank 1 on gear-b has stopped in" in lines[0]
    assert_nothing_left(hosts)


def test_bench_tells_what_moves_between_hosts(hosts: tuple[Host, Host], folder: Path) -> None:
    """One rank on each host, TP 1: either lacks the other's half of the weights, and gets it over the cable."""
    words = [sys.executable, "-m", "gearshift.launch", "bench", "ppo.yaml", "--hostfile", "hosts", *ONE_RANK_EACH]
    # Else DeepSpeed keeps weights as small as these whole on every rank, and none would be lacking.
    words += ["--deepspeed.zero_optimization.stage3_param_persistence_threshold", "0"]
    before = sorted(path.name for path in folder.iterdir())
    code, told, _ = finished(folder, [*words, "--iterations", "2", "--out", "bench.json"], hosts[0])
    assert code == 0, told
    found = json.loads((folder / "bench.json").read_text())
    assert found["hosts"] == ["gear-a", "gear-b"]
    assert len(found["iterations"]) == 2
    half = 4 * found["parameters"] / 2
    for rank in (rank for ranks in found["iterations"] for rank in ranks):
        assert rank["bytes_inside_host"] == 0
        assert 0.9 * half < rank["bytes_between_hosts"] <= half + 4 * 100
        assert rank["shift"] > 0
    assert "shift between hosts, each rank GB/s" in told
    assert "shift inside a host" not in told
    assert sorted(path.name for path in folder.iterdir()) == sorted([*before, "bench.json"])
    assert_nothing_left(hosts)


# --- what cannot start: one line, in bounded time, and nothing is left ------------------------------------------------


def one_line(told: str, begins: str = "gearshift ppo: ") -> str:
    """The line of ours, of which there is one, without pdsh's name of the host."""
    lines = [line.removeprefix("gear-a: ") for line in told.splitlines() if begins in line]
    assert len(lines) == 1, told
    assert "Traceback" not in told
    return lines[0].removeprefix(begins)


def test_code_that_differs(hosts: tuple[Host, Host], folder: Path, tmp_path: Path) -> None:
    source = ROOT / "gearshift/rlhf/kl.py"
    shutil.copy(source, tmp_path / "kl.py")
    (tmp_path / "kl.py").open("a").write("\n# changed\n")
    with hosts[1].replaced(source, tmp_path / "kl.py"):
        code, told, seconds = finished(folder, gearshift(folder, "differs", *ONE_RANK_EACH), hosts[0])
    assert code == 2
    assert seconds < 60
    assert one_line(told).startswith("gear-a and gear-b differ: the SHA-256 of gearshift/rlhf/kl.py is ")
    assert_nothing_left(hosts)


def test_a_file_that_one_host_lacks(hosts: tuple[Host, Host], folder: Path, tmp_path: Path) -> None:
    with hosts[1].replaced(folder / "reward", tmp_path):
        code, told, seconds = finished(folder, gearshift(folder, "lacks", *ONE_RANK_EACH), hosts[0])
    assert code == 2
    assert seconds < 60
    said = one_line(told)
    assert said.startswith("on gear-b (rank 1): ppo.yaml:")
    assert str(folder / "reward") in said
    assert_nothing_left(hosts)


def test_a_data_file_that_differs(hosts: tuple[Host, Host], folder: Path, tmp_path: Path) -> None:
    source = folder / "prompts.jsonl"
    rows = source.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "prompts.jsonl").write_text("".join(rows[1:] + rows[:1]), encoding="utf-8")
    with hosts[1].replaced(source, tmp_path / "prompts.jsonl"):
        code, told, seconds = finished(folder, gearshift(folder, "stale", *ONE_RANK_EACH), hosts[0])
    assert code == 2
    assert seconds < 60
    assert one_line(told).startswith("gear-a and gear-b differ: config data.train: the SHA-256 of ")
    assert_nothing_left(hosts)


def test_a_run_folder_that_is_not_shared(hosts: tuple[Host, Host], folder: Path, tmp_path: Path) -> None:
    (folder / "own").mkdir()
    with hosts[1].replaced(folder / "own", tmp_path):
        code, told, seconds = finished(folder, gearshift(folder, "own", *ONE_RANK_EACH), hosts[0])
    assert code == 2
    assert seconds < 60
    assert one_line(told).startswith(f"run.folder: gear-b does not see {folder / 'own'} of gear-a: ")
    assert list((folder / "own").iterdir()) == []
    assert_nothing_left(hosts)


def test_a_host_that_cannot_be_reached(hosts: tuple[Host, Host], folder: Path) -> None:
    """Seen before anything starts; by the ranks, where DeepSpeed's launcher is called directly."""
    include, soon = ONE_RANK_EACH[:2], [*ONE_RANK_EACH[2:], "--run.join_seconds", "8"]
    hosts[1].cable("down")
    try:
        code, told, seconds = finished(folder, gearshift(folder, "far"), hosts[0])
        assert code == 2
        assert seconds < 60
        assert one_line(told).startswith("gear-b cannot be reached by ssh (without a password): ")
        assert_nothing_left(hosts)
        code, told, seconds = finished(folder, [*deepspeed(folder, "far", *include), *soon], hosts[0])
    finally:
        hosts[1].cable("up")
    assert code != 0
    assert seconds < 60
    assert one_line(told).startswith("rank 1 of 2 of gear-b did not come within 8 s (run.join_seconds): ")
    assert_nothing_left(hosts)


def test_a_port_in_use(hosts: tuple[Host, Host], folder: Path) -> None:
    listen = "import socket, time; s = socket.create_server(('', 29777)); print(flush=True); time.sleep(200)"
    with subprocess.Popen(hosts[0].words("python3", "-c", listen), stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None
        listener.stdout.readline()
        port = ("--master_port", "29777")
        code, told, seconds = finished(folder, gearshift(folder, "port", *port), hosts[0])
        soon = [*ONE_RANK_EACH[2:], "--run.join_seconds", "8"]
        plain = finished(folder, [*deepspeed(folder, "port", *ONE_RANK_EACH[:2], *port), *soon], hosts[0])
        hosts[0].run("kill", str(hosts[0].find("create_server")))
    assert code == 2
    assert seconds < 60
    assert one_line(told) == "port 29777 of gear-a is in use by another program: leave --master_port out"
    code, told, seconds = plain
    assert code == 2
    assert seconds < 60
    # There each host has its own launcher, and no way to hear of the other one.
    ours = [line for line in told.splitlines() if "gearshift ppo: " in line]
    assert [line.partition("gearshift ppo: ")[2][:40] for line in sorted(ours)] == [
        "port 29777 of gear-a is in use by another program"[:40],
        "rank 1 on gear-b got no answer from rank 0"[:40],
    ]
    assert_nothing_left(hosts)
