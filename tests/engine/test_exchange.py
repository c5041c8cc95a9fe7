"""Rows and weights between two ranks: gathered whatever their number and width, shifted whatever the buckets."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.engine import HybridEngine, Rows, World
from gearshift.engine.exchange import gather_rows
from gearshift.engine.saving import gathered_parameters
from tests.models import save_tiny
from tests.worker_group import WorkerGroup


@dataclass(frozen=True)
class Mixed(Rows):
    """Each kind of field that travels: int64, fp32, bool and bf16, of one and two dimensions."""

    tokens: Tensor
    values: Tensor
    mask: Tensor
    ids: Tensor
    done: Tensor
    scores: Tensor
    half: Tensor


def some_rows(count: int, width: int, seed: int) -> Mixed:
    g = torch.Generator().manual_seed(seed)
    return Mixed(
        tokens=torch.randint(-(2**62), 2**62, (count, width), generator=g),
        values=torch.randn(count, width + 1, generator=g),
        mask=torch.rand(count, width, generator=g) < 0.5,
        ids=torch.randint(0, 1000, (count,), generator=g),
        done=torch.rand(count, generator=g) < 0.5,
        scores=torch.randn(count, generator=g),
        half=torch.randn(count, 3, generator=g).bfloat16(),
    )


def gathered(world: World, shapes: list[tuple[int, int]]) -> tuple[Mixed, list[int]]:
    mine = some_rows(*shapes[world.rank], seed=world.rank)
    return gather_rows(mine, dist.group.WORLD)


def padded(tensor: Tensor, width: int) -> Tensor:
    return tensor if tensor.dim() == 1 else torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))


@pytest.mark.parametrize("shapes", [[(3, 4), (3, 4)], [(2, 7), (5, 3)], [(1, 2), (4, 9)], [(0, 0), (3, 4)]])
def test_rows_of_unequal_number_and_width(two_ranks: WorkerGroup, shapes: list[tuple[int, int]]) -> None:
    """Rank order, padded with 0 on the right, every bit as it was, the same on both ranks."""
    parts = [some_rows(*shape, seed=rank) for rank, shape in enumerate(shapes)]
    for whole, counts in two_ranks.run(gathered, shapes):
        assert counts == [rows for rows, _ in shapes]
        for name in Mixed.__dataclass_fields__:
            own = [getattr(part, name) for part in parts]
            width = max(t.shape[-1] for t in own) if own[0].dim() == 2 else 0
            expected = torch.cat([padded(t, width) for t in own])
            found = getattr(whole, name)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected), name


def test_a_rank_without_rows_may_have_the_wider_tensors(two_ranks: WorkerGroup) -> None:
    """As `batch.select` leaves them: [0, W]."""
    for whole, counts in two_ranks.run(gathered, [(0, 9), (2, 3)]):
        assert counts == [0, 2]
        assert torch.equal(whole.tokens[:, :3], some_rows(2, 3, seed=1).tokens)
        assert (whole.tokens[:, 3:] == 0).all()


def test_alone_nothing_is_copied() -> None:
    batch = some_rows(3, 4, seed=0)
    found, counts = gather_rows(batch, None)
    assert found is batch
    assert counts == [3]


def refuses_more_dimensions(world: World) -> str:
    try:
        gather_rows(Cube(torch.zeros(2, 3, 4)), dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "gathered"


@dataclass(frozen=True)
class Cube(Rows):
    values: Tensor


def test_three_dimensions_are_refused(two_ranks: WorkerGroup) -> None:
    assert all("shape [2, 3, 4]" in message for message in two_ranks.run(refuses_more_dimensions))


def shift_in_buckets(world: World, folder: str, bucket_bytes: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Wrong tensors, bytes that this rank received, bytes that the plan says."""
    policy = HybridEngine.load(
        folder,
        world,
        dtype=dtype,
        micro_batch_size=2,
        tp_size=2,
        bucket_bytes=bucket_bytes,
        # Nothing is kept whole, as in a model of more than toy size.
        deepspeed_extra={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    )
    with policy.rollout():
        replica, shift = policy._replica, policy._shift
        assert replica is not None
        assert shift is not None
        assert len(shift.plan.buckets) > {64 << 20: 0, 2048: 1, 136: 20}[bucket_bytes]
        wrong = 0
        for name, whole in gathered_parameters(policy.module):
            wrong += not torch.equal(replica.layout.splits[name].cut(whole, world.rank), replica.slices[name])
    return wrong, policy.shift_bytes, int(shift.plan.traffic().received[world.rank]) * dtype.itemsize


@pytest.mark.parametrize("bucket_bytes", [64 << 20, 2048, 136])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shift_in_any_buckets_moves_the_weights(
    two_ranks: WorkerGroup, tmp_path: Path, bucket_bytes: int, dtype: torch.dtype
) -> None:
    """Tensors cut over many buckets, at odd offsets, arrive whole; the bytes are those that the plan says."""
    folder = str(save_tiny("qwen2", tmp_path / "qwen2"))
    for wrong, received, planned in two_ranks.run(shift_in_buckets, folder, bucket_bytes, dtype):
        assert wrong == 0
        assert received == planned > 0
