"""SIGSTOP of a rank in rollout, update and save: the others end within the time-out + 10 s, naming rank and phase."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from gearshift.engine import World
from gearshift.engine.checkpoints import files
from gearshift.engine.generator import Generator
from gearshift.engine.watchdog import HUNG
from gearshift.rlhf.ppo import Ppo
from tests.rlhf.tiny import changed

from .ranks import run_ranks, said
from .runs import small_run, train

SECONDS = 4.0
PLACES = {"generation": "generation", "train": "train", "save": "saving step 1"}


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return changed(small_run(tmp_path_factory.mktemp("run")), run={"hang_seconds": SECONDS})


def train_stopped_in(world: World, values: dict[str, Any], rank: int, place: str, log: Path) -> None:
    def stop(*_: Any) -> None:
        if world.rank == rank and not (log / "stopped").exists():
            time.sleep(1.5)  # in the phase for longer than between two signs of life
            (log / "stopped").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGSTOP)

    if place == "save":
        files.hook = lambda operation, path: stop() if ".writing" in str(path) else None
    elif place == "generation":
        generate = Generator.generate
        Generator.generate = lambda *args: (stop(), generate(*args))[1]  # type: ignore[method-assign]
    else:
        update = Ppo.update_policy
        Ppo.update_policy = lambda *args: (stop(), update(*args))[1]  # type: ignore[method-assign]
    train(world, values)


@pytest.mark.parametrize(("place", "rank"), [("generation", 1), ("train", 1), ("save", 1), ("train", 0)])
def test_a_rank_that_is_stopped(values: dict[str, Any], tmp_path: Path, place: str, rank: int) -> None:
    """Rank 0, too, which keeps the store. The stopped process is killed, so that nothing is left of the run."""
    before = set(os.listdir("/dev/shm"))
    own = changed(values, run={"folder": str(tmp_path / "run")})
    codes = run_ranks(tmp_path, train_stopped_in, own, rank, place, tmp_path, alone=3.0)
    ended = time.time()
    assert codes[1 - rank] == HUNG, said(tmp_path, 1 - rank)
    assert codes[rank] == -signal.SIGKILL
    told = said(tmp_path, 1 - rank)
    assert f"rank {rank} has stopped in {PLACES[place]}: no sign of it for {SECONDS:g} s; the run ends here" in told
    assert ended - float((tmp_path / "stopped").read_text()) < SECONDS + 10
    assert set(os.listdir("/dev/shm")) <= before


def hang(world: World, values: dict[str, Any]) -> None:
    """Rank 1's main thread sleeps in its second update while its other threads live."""
    update, count = Ppo.update_policy, [0]

    def sleep(*args: Any) -> Any:
        count[0] += 1
        if world.rank == 1 and count[0] == 2:
            time.sleep(120)
        return update(*args)

    Ppo.update_policy = sleep  # type: ignore[method-assign]
    train(world, values)


def test_a_rank_that_hangs(values: dict[str, Any], tmp_path: Path) -> None:
    own = changed(values, run={"folder": str(tmp_path / "run")})
    codes = run_ranks(tmp_path, hang, own, alone=3.0)
    assert HUNG in codes
    assert "no rank has come further for 4 s: " in said(tmp_path, 0)
    assert "rank 1 hangs in train (test_hangs.py:" in said(tmp_path, 0)
