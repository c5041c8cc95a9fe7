"""Groups of ranks that hold a replica together: who shares memory, and that both ways give the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gearshift.engine import World
from gearshift.engine.tape import Tape
from gearshift.engine.tensor_parallel import TensorParallelGroup
from gearshift.kernels.native.tasks import Tasks
from tests.worker_group import WorkerGroup


def own(rank: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(rank)).to(dtype).t()


def reduced(world: World, size: int, local_size: int) -> tuple[bool, list[bool]]:
    """Whether the group shares memory, and whether stacks and sums of what is not contiguous are those of its ranks."""
    local_rank = world.rank % local_size
    group = TensorParallelGroup(replace(world, local_rank=local_rank, local_size=local_size), size)
    ranks, right = group.placement.group(group.index), []
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 0.05), (torch.float32, 1e-6)):
        parts = torch.stack([own(rank, dtype) for rank in ranks])
        right.append(torch.equal(group.all_gather(own(world.rank, dtype)), parts))
        gaps = group.all_reduce(own(world.rank, dtype)).float() - parts.float().sum(0)
        right.append(float(gaps.abs().max()) <= bound)
    return group.neighbours is not None, right


@pytest.mark.parametrize(
    ("size", "local_size", "shares"),
    [(1, 4, False), (2, 4, True), (4, 4, True), (2, 2, True), (4, 2, False), (2, 1, False)],
)
def test_sums_are_those_of_the_group(four_ranks: WorkerGroup, size: int, local_size: int, shares: bool) -> None:
    """On one host; as if on two, where groups are inside one or span both; as if each rank had its own."""
    for found, right in four_ranks.run(reduced, size, local_size):
        assert found == shares
        assert all(right)


def recorded(world: World) -> tuple[list[str], list[bool]]:
    """Of groups of two: what a recorded step does, and whether its sums are right again and again, by three threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    group, x = TensorParallelGroup(world, 2), torch.zeros(200_000)
    few, out = torch.zeros(100), torch.zeros(200_000)

    def step() -> None:
        out.copy_(group.all_reduce(x * 2) + group.all_gather(few * 3).sum())

    replay, right = Tape().record(step), []
    for turn in range(5):
        x.fill_(world.rank + turn)
        few.fill_(float(world.rank))
        replay()
        ranks = group.placement.group(group.index)
        wanted = sum(2.0 * (rank + turn) + 3.0 * rank * len(few) for rank in ranks)
        right.append(bool((out == wanted).all()))
    torch.set_num_threads(before)
    return [task.name for one in replay.args[1] if isinstance(one, Tasks) for task in one.tasks], right


def test_a_recorded_step_sums(four_ranks: WorkerGroup) -> None:
    for names, right in four_ranks.run(recorded):
        assert names == ["put_part", "meet", "take_parts", "together"]
        assert right == [True] * 5


def on_uneven_hosts(world: World) -> bool:
    """The first rank has a host of its own: whether this one's group shares memory."""
    local = {"local_rank": max(0, world.rank - 1), "local_size": 1 if world.rank == 0 else 3}
    group = TensorParallelGroup(replace(world, **local), 2)
    assert float(group.all_reduce(torch.ones(1))) == 2.0
    return group.neighbours is not None


def test_hosts_may_have_other_numbers_of_ranks(four_ranks: WorkerGroup) -> None:
    assert four_ranks.run(on_uneven_hosts) == [False, False, True, True]
