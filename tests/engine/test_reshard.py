"""The plan of a shift, played on index tensors for all ranks at once: no processes, any shapes and splits."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gearshift.engine.layout import Split
from gearshift.engine.reshard import Piece, ReshardPlan

Ranges = tuple[tuple[int, int], ...]


def uneven_ranges(size: int, tp_size: int) -> Ranges:
    """How a vocabulary is split: parts differ by one row, and are empty where there are more ranks than rows."""
    return tuple((r * size // tp_size, (r + 1) * size // tp_size) for r in range(tp_size))


def repeated_ranges(heads: int, unit: int, tp_size: int) -> Ranges:
    """How key/value heads are split over more ranks than there are heads."""
    return tuple((r * heads // tp_size * unit, (r * heads // tp_size + 1) * unit) for r in range(tp_size))


@st.composite
def parameters(draw: Any, tp_size: int) -> tuple[tuple[int, ...], Split]:
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    dim = draw(st.one_of(st.none(), st.integers(0, len(shape) - 1)))
    if dim is None:
        return tuple(shape), Split()
    if draw(st.booleans()):
        heads, unit = draw(st.integers(1, tp_size)), draw(st.integers(1, 3))
        shape[dim] = heads * unit
        return tuple(shape), Split(dim, repeated_ranges(heads, unit, tp_size))
    return tuple(shape), Split(dim, uneven_ranges(shape[dim], tp_size))


@st.composite
def plans(draw: Any) -> tuple[ReshardPlan, int]:
    """A plan and the bucket size that it was built with."""
    tp_size = draw(st.integers(1, 4))
    named = {f"p{i}": draw(parameters(tp_size)) for i in range(draw(st.integers(1, 4)))}
    bucket = draw(st.integers(1, 50))
    shapes, splits = {n: shape for n, (shape, _) in named.items()}, {n: split for n, (_, split) in named.items()}
    return ReshardPlan.build(shapes, splits, tp_size * draw(st.integers(1, 3)), tp_size, bucket), bucket


def whole_tensor(plan: ReshardPlan, name: str) -> Tensor:
    """Every element is its own flat index, so that one that lands in the wrong place is seen."""
    return torch.arange(math.prod(plan.shapes[name])).view(plan.shapes[name])


def wanted_slice(plan: ReshardPlan, name: str, rank: int) -> Tensor:
    split, whole = plan.splits[name], whole_tensor(plan, name)
    if split.dim is None:
        return whole
    low, high = split.ranges[rank % plan.tp_size]
    return whole.narrow(split.dim, low, high - low)


def shards_of(plan: ReshardPlan, name: str) -> list[Tensor]:
    """ZeRO-3's cut: flattened, padded to a multiple of the ranks, equal parts; without the padding."""
    flat = whole_tensor(plan, name).flatten()
    size = math.ceil(len(flat) / plan.zero_world)
    return [flat[rank * size : (rank + 1) * size] for rank in range(plan.zero_world)]


def move(piece: Piece, shard: Tensor, shard_start: int, flat: Tensor) -> None:
    """One piece from a sender's shard to a receiver's flat slice; within the bounds of both, and nothing twice."""
    for i in range(piece.count):
        source = piece.source + i * piece.source_stride - shard_start
        dest = piece.dest + i * piece.dest_stride
        assert 0 <= source <= source + piece.length <= len(shard)
        assert 0 <= dest <= dest + piece.length <= len(flat)
        assert (flat[dest : dest + piece.length] == -1).all(), "written twice"
        flat[dest : dest + piece.length] = shard[source : source + piece.length]


@settings(max_examples=300, deadline=None)
@given(plans())
def test_every_rank_gets_exactly_its_slices(case: tuple[ReshardPlan, int]) -> None:
    plan, bucket_elements = case
    for receiver in range(plan.zero_world):
        slices = {n: torch.full(wanted_slice(plan, n, receiver).shape, -1) for n in plan.shapes}
        flat = {n: t.view(-1) for n, t in slices.items()}
        for bucket in plan.buckets:
            arriving = 0
            for item in bucket:
                shards = shards_of(plan, item.name)
                for sender in range(plan.zero_world):
                    pieces = plan.pieces(item, sender, receiver)
                    assert len(pieces) <= 3
                    for piece in pieces:
                        move(piece, shards[sender], plan.shard(item.name, sender)[0], flat[item.name])
                    arriving += sum(piece.elements for piece in pieces)
            assert arriving <= bucket_elements
        for name, got in slices.items():
            assert torch.equal(got, wanted_slice(plan, name, receiver)), name


@settings(max_examples=200, deadline=None)
@given(plans())
def test_a_rank_receives_only_what_it_lacks(case: tuple[ReshardPlan, int]) -> None:
    plan, _ = case
    for rank in range(plan.zero_world):
        lacking = 0
        for name in plan.shapes:
            held = set(shards_of(plan, name)[rank].tolist())
            lacking += len(set(wanted_slice(plan, name, rank).flatten().tolist()) - held)
        assert plan.received_elements(rank) == lacking


@settings(max_examples=100, deadline=None)
@given(plans())
def test_buckets_cover_every_element_once_in_order(case: tuple[ReshardPlan, int]) -> None:
    plan, bucket_elements = case
    items = [item for bucket in plan.buckets for item in bucket]
    expected = [(name, i) for name, shape in plan.shapes.items() for i in range(math.prod(shape))]
    assert [(item.name, i) for item in items for i in range(item.low, item.high)] == expected
    assert all(0 < sum(i.high - i.low for i in bucket) <= bucket_elements for bucket in plan.buckets)


def test_bytes_of_a_layer_are_the_formula() -> None:
    """ENGINE's formula for consecutive groups on one host of N = t ranks: rows halves are held already, columns not.

    4 ranks, TP 4: a column split is cut where ZeRO-3 cuts (nothing moves), a row split lacks (1/t)(1 − 1/N), a whole
    tensor 1 − 1/N.
    """
    size = 16
    shapes: dict[str, tuple[int, ...]] = {"column": (size, size), "row": (size, size), "whole": (size,)}
    splits = {"column": Split(0, uneven_ranges(size, 4)), "row": Split(1, uneven_ranges(size, 4)), "whole": Split()}
    plan = ReshardPlan.build(shapes, splits, 4, 4)
    moved = size * size // 4 * 3 // 4 + size * 3 // 4
    assert [plan.received_elements(rank) for rank in range(4)] == [moved] * 4


def test_groups_must_divide_the_ranks() -> None:
    with pytest.raises(ValueError, match="groups of 2 do not divide 3 ranks"):
        ReshardPlan.build({"p": (4,)}, {"p": Split()}, 3, 2)
