"""One rank's copies, played for all ranks at once on index tensors: buffers are packed, exchanged and unpacked."""

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from gearshift.engine.moves import Exchange, Move, exchanges, held_moves, progressions
from gearshift.engine.placement import Placement
from gearshift.engine.reshard import ReshardPlan
from gearshift.engine.split import Split
from tests.engine.test_reshard import LLAMA_70B, llama, plans, shards_of, uneven_ranges, wanted_slice, whole_tensor


def copy(move: Move, source: Tensor, dest: Tensor) -> None:
    """One move; onto nothing that was written before."""
    assert (move.write(dest) == -1).all()
    move.write(dest).copy_(move.read(source))


def play(plan: ReshardPlan) -> list[dict[str, Tensor]]:
    """The slices of every rank after a shift."""
    ranks = range(plan.placement.ranks)
    slices = [{n: torch.full(wanted_slice(plan, n, r).shape, -1) for n in plan.shapes} for r in ranks]
    for exchange in zip(*(exchanges(plan, rank) for rank in ranks), strict=True):
        sent = [pack(plan, rank, exchange[rank], slices[rank]) for rank in ranks]
        for rank in ranks:
            arrived = torch.cat([sent[other][rank] for other in ranks])
            assert [len(sent[other][rank]) for other in ranks] == exchange[rank].received
            for move in exchange[rank].receive:
                copy(move, arrived, slices[rank][move.name])
    for rank in ranks:
        for move in held_moves(plan, rank):
            copy(move, whole_tensor(plan, move.name).view(-1), slices[rank][move.name])
    return slices


def pack(plan: ReshardPlan, rank: int, exchange: Exchange, slices: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The blocks that the rank sends, in rank order, the buffer full; its local copies are done."""
    shards = {name: shards_of(plan, name)[rank] for name in plan.shapes}
    buffer = torch.full((sum(exchange.sent),), -1)
    for move in exchange.send:
        copy(move, shards[move.name], buffer)
    for move in exchange.local:
        copy(move, shards[move.name], slices[move.name])
    assert not (buffer == -1).any()
    return buffer.split(exchange.sent)


@settings(max_examples=200, deadline=None)
@given(plans())
def test_every_rank_has_exactly_its_slices_afterwards(case: tuple[ReshardPlan, int]) -> None:
    plan, _ = case
    for rank, slices in enumerate(play(plan)):
        for name, got in slices.items():
            assert torch.equal(got, wanted_slice(plan, name, rank)), name


@settings(max_examples=100, deadline=None)
@given(plans())
def test_what_is_moved_is_what_the_plan_says(case: tuple[ReshardPlan, int]) -> None:
    """In all, which is the lower bound, and in the largest exchange, which the buffers are made for."""
    plan, _ = case
    traffic = plan.traffic()
    for rank in range(plan.placement.ranks):
        found = exchanges(plan, rank)
        assert sum(sum(e.received) for e in found) == traffic.received[rank]
        assert sum(sum(e.sent) for e in found) == traffic.sent[rank]
        host = plan.placement.host
        elsewhere = [other for other in range(plan.placement.ranks) if host(other) != host(rank)]
        assert sum(e.received[other] for e in found for other in elsewhere) == traffic.received_between_hosts[rank]
        assert sum(e.sent[other] for e in found for other in elsewhere) == traffic.sent_between_hosts[rank]
        assert max((sum(e.received) for e in found), default=0) == plan.largest_received[rank]
        assert max((sum(e.sent) for e in found), default=0) == plan.largest_sent[rank]


def test_parameters_that_are_held_whole_do_not_travel() -> None:
    shapes: dict[str, tuple[int, ...]] = {"norm": (5,), "bias": (7,), "matrix": (6, 4)}
    splits = {
        "norm": Split(),
        "bias": Split.plain(0, uneven_ranges(7, 2)),
        "matrix": Split.plain(1, uneven_ranges(4, 2)),
    }
    plan = ReshardPlan.build(shapes, splits, Placement(4, 2, 4), 100, held=["norm", "bias"])
    matrix = ReshardPlan.build({"matrix": (6, 4)}, splits, Placement(4, 2, 4), 100)
    assert plan.buckets == matrix.buckets
    assert plan.traffic().received.tolist() == matrix.traffic().received.tolist()
    assert plan.traffic().needed.tolist() == [
        n + 5 + b for n, b in zip(matrix.traffic().needed, [3, 3, 4, 4], strict=True)
    ]
    for rank, slices in enumerate(play(plan)):
        for name, got in slices.items():
            assert torch.equal(got, wanted_slice(plan, name, rank)), name


@pytest.mark.parametrize("rank", [0, 37])
def test_a_rank_among_64_makes_few_copies(rank: int) -> None:
    """Llama-3-70B, TP 8: a layer has two matrices split over their inputs, of which every rank sends to all others."""
    shapes, splits = llama(*LLAMA_70B, tp_size=8, fused=False)
    found = exchanges(ReshardPlan.build(shapes, splits, Placement(64, 8, 8), 32 << 20), rank)
    copies = sum(len(moves) for e in found for moves in (e.send, e.local, e.receive))
    blocks = sum(1 for e in found for counts in (e.sent, e.received) for n in counts if n)
    assert copies / len(shapes) < 12
    assert blocks / len(shapes) > 30  # of a piece or more each: so many copies, taken one by one


def test_progressions() -> None:
    assert list(progressions([])) == []
    assert list(progressions([(5,)])) == [(0, 1, (0,))]
    points = [(0, 0), (2, 3), (4, 6), (5, 6), (9, 9)]
    assert list(progressions(points)) == [(0, 3, (2, 3)), (3, 2, (4, 3))]
    assert list(progressions([(0, 3), (1, 2)])) == [(0, 1, (0, 0)), (1, 1, (0, 0))]  # a stride cannot be negative


def test_sizes_of_a_peak() -> None:
    """Two of each buffer, one where there is a single exchange, none for a rank alone."""
    shapes: dict[str, tuple[int, ...]] = {"a": (8, 8), "b": (8, 8)}
    splits = {"a": Split.plain(1, uneven_ranges(8, 2)), "b": Split.plain(1, uneven_ranges(8, 2))}
    for bucket, buffers, moved in ((16, 2, 16), (1000, 1, 32)):  # a rank sends and receives a quarter of each
        plan = ReshardPlan.build(shapes, splits, Placement(2, 2, 2), bucket)
        assert plan.buffers == buffers
        assert [plan.peak(rank) for rank in (0, 1)] == [buffers * 2 * moved] * 2
    alone = ReshardPlan.build(shapes, {"a": Split(), "b": Split()}, Placement(1, 1, 1), 16)
    assert alone.buffers == alone.peak(0) == 0
