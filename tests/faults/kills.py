"""Fifty kills at random moments of one run of sixty iterations, which `--max-restarts` brings to its end all the same.

A command of its own, for its length: `make test-kills`. SEED=number repeats a run of it.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gearshift.engine.checkpoints.reading import newest, pointer_problem, steps
from gearshift.launch.processes import ranks_of
from tests.rlhf.test_resuming import BATCH, weights
from tests.rlhf.tiny import changed

from .runs import small_run
from .test_signals import children, command, environment

ITERATIONS, KILLS = 60, 50
STARTING = 12.0  # seconds in which a killed rank may not have begun to train yet


class Run:
    """`gearshift ppo` as it starts again and again."""

    def __init__(self, values: dict[str, Any], folder: Path, log: Path):
        self.folder = folder
        with log.open("w") as file:
            words = command(values, folder, "--max-restarts", str(KILLS))
            self.process = subprocess.Popen(words, env=environment(), stdout=file, stderr=file)

    @property
    def done(self) -> int:
        """Iterations that the metrics tell of, those since the newest checkpoint included."""
        path = self.folder / "metrics.jsonl"
        return len(path.read_bytes().splitlines()) if path.is_file() else 0

    def new_ranks(self, before: set[int]) -> list[int]:
        """The two ranks of a start after that of `before`."""
        return self._wait(lambda: [rank for rank in self._ranks() if rank not in before], 2)

    def _ranks(self) -> list[int]:
        with suppress(OSError):
            return [rank for launcher in children(self.process.pid) for rank in ranks_of(launcher)]
        return []

    def wait_for(self, iteration: int) -> None:
        self._wait(lambda: list(range(self.done)), iteration)

    def _wait(self, look: Any, count: int) -> list[int]:
        deadline = time.monotonic() + 300
        while len(found := look()) < count:
            assert self.process.poll() is None, "the run has ended"
            assert time.monotonic() < deadline, f"{count} awaited, {found} there"
            time.sleep(0.02)
        return list(found)


def kill(ranks: list[int], chance: random.Random) -> None:
    """One of them or both."""
    chosen = chance.sample(ranks, chance.choice([1, 1, 2]))
    for rank in chosen:
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


def test_fifty_kills(tmp_path: Path) -> None:
    chance = random.Random(seed := int(os.environ.get("SEED", time.time_ns() % 10**6)))
    values = small_run(tmp_path / "data")
    values = changed(values, ppo={"episodes": ITERATIONS * BATCH}, checkpoint={"every": 1, "keep": 2})
    whole = subprocess.run(command(values, tmp_path / "whole"), env=environment(), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    run, ranks, early = Run(values, tmp_path / "run", tmp_path / "log"), set[int](), 0
    for number in range(KILLS):
        new = run.new_ranks(ranks)
        ranks |= set(new)
        if run.done * KILLS > number * ITERATIONS:  # so that the kills are spread over the whole run
            time.sleep(chance.uniform(0, STARTING))
            early += 1
        else:
            run.wait_for(run.done + 1)
            time.sleep(chance.uniform(0, 0.6))
        kill(new, chance)
        print(f"kill {number + 1}: {run.done} iterations", flush=True)
    assert run.process.wait(timeout=600) == 0, (tmp_path / "log").read_text()[-2000:]
    print(f"seed {seed}: {early} kills within {STARTING:g} s of a start, {KILLS - early} after an iteration")
    assert weights(run.folder) == weights(tmp_path / "whole")
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == ITERATIONS
    assert pointer_problem(run.folder / "checkpoints") is None
    assert newest(run.folder / "checkpoints", refuse=True)[1] == []
    assert steps(run.folder / "checkpoints")[-1] == ITERATIONS
