"""Collectives through memory that ranks of one host share, against gloo's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.engine import World
from gearshift.engine import neighbours as near
from gearshift.kernels import decode_step, native
from gearshift.kernels.native.tasks import NOT_YET, TOO_LATE, Tasks
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
        found = near.shared(dist.group.WORLD, world.rank, list(range(world.size)), 0)
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


def summed(world: World) -> list[bool]:
    """Of each size: the sum in the order of ranks, in place, to its bits; and what all ranks have, in their order."""
    group, right = shared(world), []
    for size in SIZES:
        own = numbers(size, world.rank)
        parts = torch.stack([numbers(size, rank) for rank in range(world.size)])
        stacked = group.stacked(own)
        right.append(torch.equal(stacked, parts))
        again = group.sum(own)
        right.append(torch.equal(own, parts[0] + parts[1] + parts[2]) and again.data_ptr() == own.data_ptr())
    return right


def test_sums_in_place_are_of_the_same_bits_everywhere(three_ranks: WorkerGroup) -> None:
    assert three_ranks.run(summed) == [[True] * 2 * len(SIZES)] * 3


def several_threads(world: World) -> bool:
    """A sum whose parts are taken by threads, in the memory that there is, with one chunk and with several."""
    group = near.shared(dist.group.WORLD, world.rank, list(range(world.size)), 0)
    assert group is not None
    before, right = torch.get_num_threads(), True
    torch.set_num_threads(3)
    for size in (300_000, 1_000_000):
        parts = [numbers(size, rank) for rank in range(world.size)]
        own = parts[world.rank].clone()
        for _ in range(3):
            right &= torch.equal(group.sum(own.copy_(parts[world.rank])), parts[0] + parts[1] + parts[2])
    torch.set_num_threads(before)
    return right


def test_several_threads_sum(three_ranks: WorkerGroup) -> None:
    assert three_ranks.run(several_threads) == [True] * 3


def listed(world: World) -> list[float]:
    """Sums within one list of tasks, as a recorded step has them, again and again, a rank late in turn; others between
    them."""
    group, found = shared(world), torch.zeros(300)
    steps = Tasks([*group._tasks(found, found, 0), *group._tasks(found, found, 0)])
    totals = []
    for turn in range(6):
        found.fill_(world.rank + turn)
        if turn % world.size == world.rank:
            time.sleep(0.02)
        steps()
        totals.append(float(found[-1]))
        assert float(group.sum(torch.ones(5))[0]) == 3.0
    return totals


def test_sums_of_a_list_of_tasks(three_ranks: WorkerGroup) -> None:
    assert three_ranks.run(listed) == [[3.0 * (3 + 3 * turn) for turn in range(6)]] * 3


def some_of_the_world(world: World) -> list[float]:
    """The first and the last rank, in this order of their parts, and the middle one alone."""
    groups = [dist.new_group(ranks) for ranks in ([0, 2], [1])]
    mine = [0, 2] if world.rank != 1 else [1]
    group = near.shared(groups[world.rank % 2], mine.index(world.rank), mine, 0)
    return [] if group is None else group.stacked(torch.tensor([float(world.rank)])).flatten().tolist()


def test_some_ranks_of_the_world(three_ranks: WorkerGroup) -> None:
    assert three_ranks.run(some_of_the_world) == [[0.0, 2.0], [], [0.0, 2.0]]


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
    """Whether ranks share memory where the last cannot see the first's, where it is on another host, and of a world on
    several hosts, and on GPUs."""
    everybody = list(range(world.size))
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == world.size - 1:
            patch.setattr(near, "_opened", lambda *told: None)
        one = near.shared(dist.group.WORLD, world.rank, everybody, 0)
    other = near.shared(dist.group.WORLD, world.rank, everybody, world.rank // 2)
    worlds = [replace(world, local_size=1), replace(world, device=torch.device("cuda"))]
    return [one is not None, other is not None, *(near.neighbours(world) is not None for world in worlds)]


def test_all_share_or_none(three_ranks: WorkerGroup) -> None:
    assert three_ranks.run(out_of_sight) == [[False] * 4] * 3


SUMS = [
    lambda group, x: Tasks([*group._tasks(x, x, 0), decode_step.sum_of(x, x, x)] * 10)(),
    lambda group, x: group.sum(x),
    lambda group, x: group.meet(),
]


def left_alone(world: World, ended: int) -> list[str]:
    """The last one, of this process, does not come: what the others are told, at whatever they do first and then."""
    said = []
    for first in SUMS:
        group, x = shared(world), torch.ones(5)
        if world.rank == world.size - 1:
            continue
        group._processes[0, -1] = ended
        start = time.monotonic()
        for collective in (first, *SUMS):
            with pytest.raises(ConnectionError) as caught:
                collective(group, x)
            said.append(str(caught.value))
        assert time.monotonic() - start < 5, "not a second for each of all these sums"
        assert x.tolist() == [1.0] * 5
    return said


@pytest.mark.parametrize("threads", [1, 3])
def test_who_waits_for_a_rank_that_has_ended_is_told(three_ranks: WorkerGroup, threads: int) -> None:
    """Nothing of a list is done any more, and no sum that comes later: nobody knows who was counted."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        while not has_ended(process.pid):  # its end is not taken note of: it stays a zombie
            time.sleep(0.01)
        told = three_ranks.run(by_threads, threads, left_alone, process.pid)
    assert told == [["rank 2 has ended, this one waits for it"] * 12] * 2 + [[]]
    assert has_ended(process.pid)
    assert not has_ended(os.getpid())


def by_threads(world: World, threads: int, function: Callable[..., Any], *given: Any) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function(world, *given)
    finally:
        torch.set_num_threads(before)


def has_ended(process: int) -> bool:
    numbers = torch.tensor([process])
    return native.function("ended", "pi")(numbers.data_ptr(), 1) == 0


def told_by_the_last(world: World) -> list[str]:
    """The last one fails alone, and lives: the others, who would wait for half an hour, are told."""
    told = []
    for collective in SUMS:
        group = shared(world)
        if world.rank == world.size - 1:
            time.sleep(0.3)
            native.function("fail", "pi")(group._meeting, TOO_LATE)
        with pytest.raises(ConnectionError) as caught:
            collective(group, torch.ones(1))
        told.append(str(caught.value))
    return told


def test_who_fails_tells_those_who_wait(three_ranks: WorkerGroup) -> None:
    said = "this rank has waited for others, which live and do not come"
    assert three_ranks.run(told_by_the_last, timeout=60) == [[said] * 3] * 3


def without_the_last(world: World) -> list[str]:
    """It lives, and comes too late: what each is told."""
    import deepspeed.constants

    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed.constants, "default_pg_timeout", timedelta(seconds=1))
        patch.setattr(near, "_LONGER", 0.0)
        for collective in SUMS[1:]:
            group = shared(world)
            if world.rank == world.size - 1:
                time.sleep(4)
            with pytest.raises(ConnectionError) as caught:
                collective(group, torch.ones(1))
            told.append(str(caught.value))
    return told


def test_nobody_waits_for_ever(three_ranks: WorkerGroup) -> None:
    said = "this rank has waited for others, which live and do not come"
    assert three_ranks.run(without_the_last) == [[said] * 2] * 3


def test_the_library_is_told_of_time() -> None:
    """A meeting that nobody else comes to, and then somebody does."""
    meeting, processes = torch.zeros(3, dtype=torch.int32), torch.tensor([[os.getpid()] * 2, [0, 1]])
    given = meeting.data_ptr(), 2, processes.data_ptr()
    arrive, wait = native.function("arrive", "pi"), native.function("await", "pipii")
    round_ = arrive(meeting.data_ptr(), 2)
    start = time.monotonic()
    assert wait(*given, round_, 100) == NOT_YET
    assert time.monotonic() - start >= 0.09
    arrive(meeting.data_ptr(), 2)
    assert wait(*given, round_, 100) == 0
