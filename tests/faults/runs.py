"""A small PPO-ptx run, and the ways in which its ranks die."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gearshift.engine import World
from gearshift.engine.checkpoints import files
from gearshift.launch.config import validate
from tests.rlhf.test_resuming import BATCH, saved_values, weights
from tests.rlhf.tiny import Recorder, changed

ITERATIONS = 3


def small_run(folder: Path) -> dict[str, Any]:
    """Three iterations, one checkpoint after each, of which one stays."""
    ppo = {"episodes": ITERATIONS * BATCH, "validate_every": 0}
    return changed(saved_values(folder), ppo=ppo, checkpoint={"every": 1, "keep": 1})


def in_folder(values: dict[str, Any], folder: Path, resume: str | None = None) -> dict[str, Any]:
    return changed(values, run={"folder": str(folder)}, checkpoint={"resume": resume})


def train(world: World, values: dict[str, Any]) -> Recorder:
    from gearshift.rlhf.ppo import ppo

    config: Any = validate("ppo", values)
    report = Recorder()
    ppo(config, report)
    return report


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt:
    """A hook that kills this rank before the `count`-th operation on files since the save of `step` began."""

    def __init__(self, step: int, count: int):
        self.name, self.left, self.begun = f".step-{step:08d}.writing", count, False

    def __call__(self, operation: str, path: Path) -> None:
        self.begun = self.begun or self.name in str(path)
        if self.begun:
            if self.left == 0:
                die()
            self.left -= 1


class Noted(KillAt):
    """Writes down each operation instead."""

    def __init__(self, step: int, log: Path):
        super().__init__(step, -1)
        self.log = log

    def __call__(self, operation: str, path: Path) -> None:
        super().__call__(operation, path)
        if self.begun:
            with self.log.open("a") as file:
                file.write(f"{operation} {path}\n")


def train_killed_at(world: World, values: dict[str, Any], rank: int, step: int, count: int) -> None:
    if world.rank == rank:
        files.hook = KillAt(step, count)
    train(world, values)


def train_noted(world: World, values: dict[str, Any], step: int, log: Path) -> None:
    files.hook = Noted(step, log / f"operations-{world.rank}")
    train(world, values)


def train_killed_in(world: World, values: dict[str, Any], rank: int, where: str, count: int) -> None:
    """Killed at the `count`-th call of a method, "Class.method" of PPO, the engine or its checkpoints."""
    from gearshift import engine
    from gearshift.engine.checkpoints import writing
    from gearshift.rlhf import ppo

    name, _, method = where.partition(".")
    owner: Any = next(getattr(place, name) for place in (ppo, engine, writing) if hasattr(place, name))
    before: Callable[..., Any] = getattr(owner, method)
    calls = iter(range(count))

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            die()
        return before(*args, **kwargs)

    if world.rank == rank:
        setattr(owner, method, counted)
    train(world, values)


__all__ = ["BATCH", "ITERATIONS", "weights"]
