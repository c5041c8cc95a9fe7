"""The plan of a shift, played on index tensors for all ranks at once: no processes, any shapes and splits."""

import math
import time
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gearshift.engine.placement import Placement
from gearshift.engine.reshard import Item, Piece, ReshardPlan
from gearshift.engine.split import Split

Ranges = tuple[tuple[int, int], ...]


def uneven_ranges(size: int, tp_size: int) -> Ranges:
    """How a vocabulary is split: parts differ by one row, and are empty where there are more ranks than rows."""
    return tuple((r * size // tp_size, (r + 1) * size // tp_size) for r in range(tp_size))


def repeated_ranges(heads: int, unit: int, tp_size: int) -> Ranges:
    """How key/value heads are split over more ranks than there are heads."""
    return tuple((r * heads // tp_size * unit, (r * heads // tp_size + 1) * unit) for r in range(tp_size))


@st.composite
def matrices(draw: Any, tp_size: int) -> tuple[int, Ranges]:
    """The size of one matrix in the split dimension, and each rank's range of it."""
    if draw(st.booleans()):
        heads, unit = draw(st.integers(1, tp_size)), draw(st.integers(1, 3))
        return heads * unit, repeated_ranges(heads, unit, tp_size)
    size = draw(st.integers(1, 7))
    return size, uneven_ranges(size, tp_size)


@st.composite
def parameters(draw: Any, tp_size: int) -> tuple[tuple[int, ...], Split]:
    """Of one to three dimensions, whole or split; a split one packs one to four matrices."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    dim = draw(st.one_of(st.none(), st.integers(0, len(shape) - 1)))
    if dim is None:
        return tuple(shape), Split()
    packed = draw(st.lists(matrices(tp_size), min_size=1, max_size=4))
    shape[dim] = sum(size for size, _ in packed)
    return tuple(shape), Split.packed(dim, packed)


@st.composite
def plans(draw: Any) -> tuple[ReshardPlan, int]:
    """A plan and the bucket size that it was built with."""
    tp_size = draw(st.integers(1, 4))
    named = {f"p{i}": draw(parameters(tp_size)) for i in range(draw(st.integers(1, 4)))}
    bucket = draw(st.integers(1, 50))
    shapes, splits = {n: shape for n, (shape, _) in named.items()}, {n: split for n, (_, split) in named.items()}
    groups = draw(st.integers(1, 3))
    # One host; hosts of one group each, or of two where they are even.
    per_host = draw(st.sampled_from([tp_size * groups, tp_size, *([2 * tp_size] if groups % 2 == 0 else [])]))
    return ReshardPlan.build(shapes, splits, Placement(tp_size * groups, tp_size, per_host), bucket), bucket


def whole_tensor(plan: ReshardPlan, name: str) -> Tensor:
    """Every element is its own flat index, so that one that lands in the wrong place is seen."""
    return torch.arange(math.prod(plan.shapes[name])).view(plan.shapes[name])


def wanted_slice(plan: ReshardPlan, name: str, rank: int) -> Tensor:
    split, whole = plan.splits[name], whole_tensor(plan, name)
    if split.dim is None:
        return whole
    rows = [i for low, high in split.ranges[plan.placement.part(rank)] for i in range(low, high)]
    return whole.index_select(split.dim, torch.tensor(rows, dtype=torch.int64))


def shards_of(plan: ReshardPlan, name: str) -> list[Tensor]:
    """ZeRO-3's cut: flattened, padded to a multiple of the ranks, equal parts; without the padding."""
    flat = whole_tensor(plan, name).flatten()
    size = math.ceil(len(flat) / plan.placement.ranks)
    return [flat[rank * size : (rank + 1) * size] for rank in range(plan.placement.ranks)]


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
    for receiver in range(plan.placement.ranks):
        slices = {n: torch.full(wanted_slice(plan, n, receiver).shape, -1) for n in plan.shapes}
        flat = {n: t.view(-1) for n, t in slices.items()}
        for bucket in plan.buckets:
            arriving = 0
            for item in bucket:
                shards = shards_of(plan, item.name)
                for sender in range(plan.placement.ranks):
                    pieces = plan.pieces(item, sender, receiver)
                    split = plan.splits[item.name]
                    assert len(pieces) <= 3 * max(1, len(split.ranges[0]) if split.ranges else 1)
                    for piece in pieces:
                        move(piece, shards[sender], plan.shard(item.name, sender)[0], flat[item.name])
                    arriving += sum(piece.elements for piece in pieces) if sender != receiver else 0
            assert arriving <= max(bucket_elements, plan.placement.ranks)
        for name, got in slices.items():
            assert torch.equal(got, wanted_slice(plan, name, receiver)), name


@settings(max_examples=200, deadline=None)
@given(plans())
def test_a_rank_receives_only_what_it_lacks(case: tuple[ReshardPlan, int]) -> None:
    """The traffic is what the pieces add up to, and that is what each rank needs and does not hold: by brute force."""
    plan, _ = case
    traffic, ranks = plan.traffic(), range(plan.placement.ranks)
    sent, sent_elsewhere = dict.fromkeys(ranks, 0), dict.fromkeys(ranks, 0)
    for rank in ranks:
        needed = lacking = elsewhere = 0
        for name in plan.shapes:
            shards, wanted = shards_of(plan, name), set(wanted_slice(plan, name, rank).flatten().tolist())
            needed += len(wanted)
            lacking += len(wanted - set(shards[rank].tolist()))
            for other in ranks:
                moved = sum(p.elements for b in plan.buckets for i in b if i.name == name
                            for p in plan.pieces(i, other, rank))  # fmt: skip
                assert moved == len(wanted & set(shards[other].tolist()))
                sent[other] += moved if other != rank else 0
                if plan.placement.host(other) != plan.placement.host(rank):
                    elsewhere += moved
                    sent_elsewhere[other] += moved
        assert traffic.needed[rank] == needed
        assert traffic.received[rank] == lacking
        assert traffic.received_between_hosts[rank] == elsewhere
    assert traffic.sent.tolist() == list(sent.values())
    assert traffic.sent_between_hosts.tolist() == list(sent_elsewhere.values())


@settings(max_examples=100, deadline=None)
@given(plans())
def test_buckets_cover_every_shard_once_in_order_and_hold_to_their_size(case: tuple[ReshardPlan, int]) -> None:
    plan, bucket_elements = case
    items = [item for bucket in plan.buckets for item in bucket]
    expected = [(n, i) for n, s in plan.shapes.items() for i in range(math.ceil(math.prod(s) / plan.placement.ranks))]
    assert [(item.name, i) for item in items for i in range(item.low, item.high)] == expected
    for bucket in plan.buckets:
        sent, received = exchanged(plan, bucket)
        assert max(sent + received) <= max(bucket_elements, plan.placement.ranks)


def exchanged(plan: ReshardPlan, bucket: tuple[Item, ...]) -> tuple[list[int], list[int]]:
    """Elements that each rank sends to and receives from others, by counting pieces."""
    ranks = range(plan.placement.ranks)
    moved = {
        (sender, receiver): sum(p.elements for item in bucket for p in plan.pieces(item, sender, receiver))
        for sender in ranks for receiver in ranks if sender != receiver
    }  # fmt: skip
    return (
        [sum(n for (sender, _), n in moved.items() if sender == rank) for rank in ranks],
        [sum(n for (_, receiver), n in moved.items() if receiver == rank) for rank in ranks],
    )


def test_bytes_of_a_layer_are_the_formula() -> None:
    """ENGINE's formula for consecutive groups on one host of N = t ranks: rows halves are held already, columns not.

    4 ranks, TP 4: a column split is cut where ZeRO-3 cuts (nothing moves), a row split lacks (1/t)(1 − 1/N), a whole
    tensor 1 − 1/N.
    """
    size = 16
    shapes: dict[str, tuple[int, ...]] = {"column": (size, size), "row": (size, size), "whole": (size,)}
    splits = {
        "column": Split.plain(0, uneven_ranges(size, 4)),
        "row": Split.plain(1, uneven_ranges(size, 4)),
        "whole": Split(),
    }
    plan = ReshardPlan.build(shapes, splits, Placement(4, 4, 4))
    moved = size * size // 4 * 3 // 4 + size * 3 // 4
    assert plan.traffic().received.tolist() == [moved] * 4


@pytest.mark.parametrize(("ranks", "tp_size"), [(2, 1), (2, 2), (4, 2), (8, 2), (8, 4), (16, 4)])
def test_bytes_of_replicas_on_one_host_are_the_formula(ranks: int, tp_size: int) -> None:
    """ENGINE's: columns (1/t − 1/N), rows (1/t)(1 − 1/N), whole tensors 1 − 1/N, with tp_rank = r·t // N."""
    size, n, t = 32, ranks, tp_size
    shapes: dict[str, tuple[int, ...]] = {"column": (size, size), "row": (size, size), "whole": (size, size)}
    splits = {
        "column": Split.plain(0, uneven_ranges(size, t)),
        "row": Split.plain(1, uneven_ranges(size, t)),
        "whole": Split(),
    }
    traffic = ReshardPlan.build(shapes, splits, Placement(n, t, n)).traffic()
    numel = size * size
    expected = numel * (n - t) // (n * t) + numel * (n - 1) // (n * t) + numel * (n - 1) // n
    assert traffic.received.tolist() == [expected] * n
    assert traffic.received_between_hosts.tolist() == [0] * n


def test_the_order_of_ranks_on_one_host_moves_least() -> None:
    """4 ranks in two groups of 2: columns cost 1/t − 1/N of the matrix, as ENGINE's formula says for r·t // N.

    Groups of consecutive ranks, as they are laid out over several hosts, would leave two ranks with nothing of theirs.
    """
    shapes: dict[str, tuple[int, ...]] = {"column": (16, 16)}
    splits = {"column": Split.plain(0, uneven_ranges(16, 2))}

    def received(per_host: int) -> list[int]:
        found: list[int] = ReshardPlan.build(shapes, splits, Placement(4, 2, per_host)).traffic().received.tolist()
        return found

    assert received(per_host=4) == [64, 64, 64, 64]
    assert received(per_host=2) == [64, 128, 128, 64]


# Hidden, intermediate, layers, key/value heads of 128; 128,256 tokens, 64 or 128 heads of 128.
LLAMA_70B, LLAMA_405B = (8192, 28672, 80, 8), (16384, 53248, 126, 8)


def llama(
    hidden: int, intermediate: int, layers: int, kv_heads: int, tp_size: int, fused: bool
) -> tuple[dict[str, Any], dict[str, Split]]:
    """Shapes and splits as `TensorParallelLayout` gives them; `fused`: as Phi-3 has them, with qkv and gate_up."""
    key = kv_heads * 128
    packs = {"qkv": [hidden, key, key], "gate_up": [intermediate] * 2} if fused else {
        "q": [hidden], "k": [key], "v": [key], "gate": [intermediate], "up": [intermediate]}  # fmt: skip
    rows = {"o": (hidden, hidden), "down": (hidden, intermediate)}

    def packed(sizes: list[int]) -> tuple[tuple[int, ...], Split]:
        return (sum(sizes), hidden), Split.packed(0, [(size, uneven_ranges(size, tp_size)) for size in sizes])

    one = {name: packed(sizes) for name, sizes in packs.items()}
    one |= {name: (shape, Split.plain(1, uneven_ranges(shape[1], tp_size))) for name, shape in rows.items()}
    one |= {"norm": ((hidden,), Split()), "post_norm": ((hidden,), Split())}
    named = {f"layers.{i}.{name}": value for i in range(layers) for name, value in one.items()}
    named |= {"embed": packed([128_256]), "head": packed([128_256]), "norm": ((hidden,), Split())}
    return {name: shape for name, (shape, _) in named.items()}, {name: split for name, (_, split) in named.items()}


@pytest.mark.parametrize(("size", "ranks", "billions"), [(LLAMA_70B, 64, 70.6), (LLAMA_405B, 1024, 405.8)])
@pytest.mark.parametrize("fused", [False, True])
def test_a_plan_for_a_large_model_is_small(
    size: tuple[int, int, int, int], ranks: int, billions: float, fused: bool
) -> None:
    shapes, splits = llama(*size, tp_size=8, fused=fused)
    assert sum(map(math.prod, shapes.values())) / 1e9 == pytest.approx(billions, abs=0.1)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        ReshardPlan.build(shapes, splits, Placement(ranks, 8, 8)).traffic()
        seconds.append(time.process_time() - start)
    assert min(seconds) <= 0.5
    tracemalloc.start()
    plan = ReshardPlan.build(shapes, splits, Placement(ranks, 8, 8))
    traffic = plan.traffic()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 50e6
    assert traffic.sent.sum() == traffic.received.sum()
    # A rank needs an eighth of the splits, and has about an N-th of that; all but a host's share comes from others.
    assert traffic.received.mean() == pytest.approx(billions * 1e9 / 8, rel=0.02)
    assert traffic.received_between_hosts.mean() > 0.8 * traffic.received.mean()
    # Four buffers of a bucket each, and nearly full: every rank has something to send in every exchange.
    peaks = [plan.peak(rank) for rank in range(ranks)]
    assert max(peaks) <= 4 * (16 << 20)
    assert min(peaks) > 3 * (16 << 20)
    assert len(plan.buckets) < 1.5 * traffic.received.mean() / (16 << 20)


def test_a_packed_split_is_cut_from_each_matrix() -> None:
    """[queries 8 | keys 4 | values 4] over 4 ranks, with two key/value heads of two rows that ranks share."""
    split = Split.packed(0, [(8, uneven_ranges(8, 4)), *[(4, repeated_ranges(2, 2, 4))] * 2])
    whole = torch.arange(16)
    assert split.cut(whole, 1).tolist() == [2, 3, 8, 9, 12, 13]
    assert split.cut(whole, 3).tolist() == [6, 7, 10, 11, 14, 15]
    assert split.shape((16, 5), 3) == (6, 5)
    assert Split().cut(whole, 1) is whole


@pytest.mark.parametrize(("ranks", "tp_size", "per_host"), [(8, 2, 8), (8, 4, 4), (8, 8, 4), (4, 1, 4)])
def test_every_rank_is_in_one_group_and_every_part_in_each(ranks: int, tp_size: int, per_host: int) -> None:
    placement = Placement(ranks, tp_size, per_host)
    groups = [placement.group(index) for index in range(placement.group_count)]
    assert sorted(rank for group in groups for rank in group) == list(range(ranks))
    for index, group in enumerate(groups):
        assert [placement.part(rank) for rank in group] == list(range(tp_size))
        assert {placement.group_of(rank) for rank in group} == {index}
        assert len({placement.host(rank) for rank in group}) == max(1, tp_size // per_host)


def test_groups_must_divide_the_ranks() -> None:
    with pytest.raises(ValueError, match="groups of 2 do not divide 3 ranks"):
        Placement(3, 2, 3)
