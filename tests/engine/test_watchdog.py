"""Rank 0's verdict on what all ranks have told, without processes; real ones are in tests/faults/test_hangs.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from gearshift.engine import watchdog
from gearshift.engine.watchdog import Watchdog


@pytest.fixture
def dog(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watchdog]:
    """Of rank 0 of two on one host, with an hour's patience: no turn of its own comes to a verdict."""
    monkeypatch.setattr(watchdog, "own_store", lambda name: dist.HashStore())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    world: Any = SimpleNamespace(rank=0, size=2, local_rank=0, is_main=True)
    found = Watchdog(world, 3600.0, end=lambda verdict: None)
    yield found
    found.stop()


def long_ago(seconds: float) -> float:
    return time.monotonic() - seconds


def test_ranks_that_live_and_move(dog: Watchdog) -> None:
    assert dog._verdict() == ""


def test_a_rank_that_is_silent(dog: Watchdog) -> None:
    dog._seen[1].update("7|3|h:12|ppo.py:1 update|train")
    dog._seen[1].beat_at = long_ago(3601)
    assert dog._verdict() == "1|h:12|rank 1 has stopped in train: no sign of it for 3600 s"


def test_ranks_that_live_and_come_no_further(dog: Watchdog) -> None:
    """The one that has come least far is named first, with its line; none is named to be killed."""
    for rank, moves in ((0, 5), (1, 4)):
        dog._seen[rank].update(f"{7 + rank}|{moves}|h:{rank}|{rank}.py:1 f|train")
        dog._seen[rank].moved_at = long_ago(3601)
    told = dog._verdict()
    assert told.startswith("-||no rank has come further for 3600 s: rank 1 hangs in train (1.py:1 f), rank 0 hangs in")


def test_only_what_is_new_is_a_sign_of_life(dog: Watchdog) -> None:
    seen = dog._seen[1]
    seen.update("7|3|h:12|a.py:1 f|train")
    seen.beat_at = seen.moved_at = 0.0
    seen.update("7|3|h:12|a.py:1 f|train")
    assert (seen.beat_at, seen.moved_at) == (0.0, 0.0)
    seen.update("8|3|h:12|a.py:2 f|train")
    assert seen.beat_at > 0.0 == seen.moved_at
