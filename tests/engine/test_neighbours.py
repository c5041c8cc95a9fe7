"""Collectives through memory that ranks of one host share, against gloo's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.engine import World
from gearshift.engine import neighbours as near
from gearshift.kernels import native
from tests.worker_group import WorkerGroup

pytestmark = pytest.mark.skipif(not near._can_share(), reason="memory is shared on Linux, by the compiled library")

# Three parts of 1,024 bytes: chunks of 256 numbers in fp32 where all is gathered, of 85 where it is scattered.
SMALL = 3 * 1024 // 2 * 2
SIZES = [1, 85, 86, 256, 257, 1000]


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[WorkerGroup]:
    group = WorkerGroup(3)
    yield group
    group.stop()


def shared(world: World) -> near.Neighbours:
    """Anew, with small chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near, "CHUNK", SMALL)
        found = near._neighbours.__wrapped__(
            dist.group.WORLD, world.rank, world.size, world.local_size, world.device.type
        )
    assert found is not None
    return found


def numbers(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gathered(world: World) -> int:
    """How often what came was what the ranks have."""
    group, right = shared(world), 0
    for dtype in (torch.float32, torch.bfloat16):
        for size in SIZES:
            found = torch.zeros(world.size, size, dtype=dtype)
            for start, parts in group.gathered(numbers(size, world.rank, dtype)):
                found[:, start : start + parts.shape[1]] = parts
            right += torch.equal(found, torch.stack([numbers(size, rank, dtype) for rank in range(world.size)]))
    return right


def test_what_all_have_comes_in_chunks(three_ranks: WorkerGroup) -> None:
    assert three_ranks.run(gathered) == [2 * len(SIZES)] * 3


def scattered(world: World) -> list[float]:
    """By how much sums differ from those of gloo, at most."""
    group, gaps = shared(world), []
    for size in SIZES:
        whole = numbers(world.size * size, world.rank).view(world.size, size)
        own, theirs = torch.empty(size), torch.empty(size)
        group.reduce_scatter(own, whole)
        dist.reduce_scatter_tensor(theirs, whole.flatten())
        gaps.append(float((own - theirs).abs().max()))
    return gaps


def test_sums_of_what_all_have(three_ranks: WorkerGroup) -> None:
    for gaps in three_ranks.run(scattered):
        assert max(gaps) <= 1e-6


def one_that_is_late(world: World) -> bool:
    """Every rank is late in turn: nobody reads what is not there yet, or writes over what is still read."""
    group, right = shared(world), True
    for turn in range(12):
        if turn % world.size == world.rank:
            time.sleep(0.02)
        for start, parts in group.gathered(torch.full((700,), float(turn * world.size + world.rank))):
            if (turn + start) % world.size == world.rank:
                time.sleep(0.005)
            right &= parts[:, 0].tolist() == [float(turn * world.size + rank) for rank in range(world.size)]
    return right


def test_a_rank_may_be_late(three_ranks: WorkerGroup) -> None:
    assert three_ranks.run(one_that_is_late) == [True] * 3


def out_of_sight(world: World) -> list[bool]:
    """Whether ranks share memory where the last cannot see the first's, and on several hosts, and on GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == world.size - 1:
            patch.setattr(near, "_opened", lambda told, size: None)
        one = near._neighbours.__wrapped__(dist.group.WORLD, world.rank, world.size, world.local_size, "cpu")
    elsewhere = near.neighbours(replace(world, local_size=1))
    return [one is not None, elsewhere is not None, near._neighbours(None, world.rank, 3, 3, "cuda") is not None]


def test_all_share_or_none(three_ranks: WorkerGroup) -> None:
    assert three_ranks.run(out_of_sight) == [[False] * 3] * 3


def left_alone(world: World, ended: int) -> str:
    """The last one, of this process, does not come: what the others are told."""
    group = shared(world)
    group._processes[-1] = ended
    if world.rank == world.size - 1:
        return ""
    with pytest.raises(ConnectionError) as told:
        group.meet()
    return str(told.value)


def test_who_waits_for_a_rank_that_has_ended_is_told(three_ranks: WorkerGroup) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        while near._is_alive(process.pid):  # its end is not taken note of: it stays a zombie
            time.sleep(0.01)
        told = three_ranks.run(left_alone, process.pid)
    assert told == ["rank 2 has ended, rank 0 waits for it", "rank 2 has ended, rank 1 waits for it", ""]
    assert not near._is_alive(process.pid)
    assert near._is_alive(os.getpid())


def without_the_last(world: World) -> str:
    """It lives, and does not come."""
    import deepspeed.constants

    group = shared(world)
    if world.rank == world.size - 1:
        return ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed.constants, "default_pg_timeout", timedelta(seconds=1))
        with pytest.raises(ConnectionError) as told:
            group.meet()
    return str(told.value)


def test_nobody_waits_for_ever(three_ranks: WorkerGroup) -> None:
    told = three_ranks.run(without_the_last)
    assert told == [f"rank {rank} has waited for the others for 0:00:01" for rank in (0, 1)] + [""]


def test_the_library_is_told_of_time() -> None:
    """A meeting that nobody else comes to."""
    meeting = torch.zeros(2, dtype=torch.int32)
    address = meeting.data_ptr()
    arrive, wait = native.function("arrive", "pi"), native.function("await", "pii")
    round_ = arrive(address, 2)
    start = time.monotonic()
    assert not wait(address, round_, 100)
    assert time.monotonic() - start >= 0.09
    arrive(address, 2)
    assert wait(address, round_, 100)
