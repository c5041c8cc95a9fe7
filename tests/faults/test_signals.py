"""`gearshift ppo` at the shell: stopped by a signal it saves and says how to go on; killed, it goes on all the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from gearshift.engine.checkpoints.reading import newest, steps
from gearshift.launch.processes import PAUSED, ranks_of
from tests.rlhf.test_resuming import BATCH, weights
from tests.rlhf.tiny import changed

from .runs import small_run

LONG = 16  # iterations: more than pass before the signal is there


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Saved seldom, so that it is the signal that saves."""
    ppo = {"episodes": LONG * BATCH}
    return changed(small_run(tmp_path_factory.mktemp("run")), ppo=ppo, checkpoint={"every": 12, "keep": 1})


def command(values: dict[str, Any], run: Path, *words: str) -> list[str]:
    config = run.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(changed(values, run={"folder": str(run), "ranks": 2})))
    return [sys.executable, "-m", "gearshift.launch", "ppo", str(config), *words]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def wait_for_step(run: Path, process: subprocess.Popen[str], step: int) -> None:
    deadline = time.monotonic() + 200
    metrics = run / "metrics.jsonl"
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    done = subprocess.run(command(values, run), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return run


def started(values: dict[str, Any], run: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(command(values, run), env=environment(), stderr=subprocess.PIPE, text=True)


def resumed(values: dict[str, Any], run: Path, whole: Path) -> str:
    """What the run says that goes on to the end, where its weights and its metrics are those of the whole one."""
    words = command(values, run, "--resume", "auto")
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert weights(run) == weights(whole)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == LONG
    return done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_run_goes_on(
    values: dict[str, Any], whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    with started(values, run) as process:
        wait_for_step(run, process, 2)
        process.send_signal(number)
        _, told = process.communicate(timeout=100)
    assert process.returncode == PAUSED == 75
    chosen, problems = newest(run / "checkpoints", refuse=True)
    assert problems == []
    step = int(chosen.name.removeprefix("step-"))
    assert 2 <= step < LONG
    assert told.splitlines()[-1] == f"gearshift ppo: saved after step {step} at SIGUSR1: go on with --resume auto"
    assert f"{chosen}: {step} steps done" in resumed(values, run, whole)


def test_a_second_signal_ends_it_at_once(values: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    """Whether before, in or after the save: what is there is whole."""
    run = tmp_path / "run"
    often = changed(values, checkpoint={"every": 1, "keep": 1})
    with started(often, run) as process:
        wait_for_step(run, process, 2)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGTERM, PAUSED)
    assert newest(run / "checkpoints", refuse=True)[1] == []
    resumed(often, run, whole)


def test_a_rank_that_is_killed(values: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    often = changed(values, checkpoint={"every": 1, "keep": 1})
    with started(often, run) as process:
        wait_for_step(run, process, 3)
        launcher = next(pid for pid in children(process.pid))
        os.kill(ranks_of(launcher)[1], signal.SIGKILL)
        _, told = process.communicate(timeout=100)
    assert process.returncode == 256 - signal.SIGKILL
    assert "SIGKILL" in told
    assert steps(run / "checkpoints")
    # Without being told to, nobody starts over what is there.
    again = subprocess.run(command(often, run), env=environment(), capture_output=True, text=True, timeout=60)
    assert again.returncode == 2
    assert "go on with --resume auto" in again.stderr
    resumed(often, run, whole)


def test_max_restarts(values: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    """Killed before there is a checkpoint and after: started again from the start, then from the newest."""
    run = tmp_path / "run"
    often = changed(values, checkpoint={"every": 2, "keep": 1})
    words = command(often, run, "--max-restarts", "2")
    with subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        for step in (1, 3):
            wait_for_step(run, process, step)
            os.kill(ranks_of(children(process.pid)[0])[0], signal.SIGKILL)
            wait_for_end(run, process, children(process.pid)[0])
        _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert [line for line in told.splitlines() if "starting again" in line] == [
        "gearshift ppo: starting again, 1 more times at most",
        "gearshift ppo: starting again, 0 more times at most",
    ]
    assert f"{run}/checkpoints/step-00000002: 2 steps done" in told
    assert weights(run) == weights(whole)


def wait_for_end(run: Path, process: subprocess.Popen[str], launcher: int) -> None:
    """Until another launcher has taken this one's place."""
    deadline = time.monotonic() + 100
    while children(process.pid)[:1] in ([], [launcher]):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found
