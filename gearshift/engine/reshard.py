"""The plan of a shift: which elements each rank sends to each other, a pure function of shapes.

Letters: N ranks of ZeRO-3, t of a tensor-parallel group.

ZeRO-3 holds a parameter flattened and cut in N contiguous shards of ceil(numel / N) elements. A tensor-parallel slice
is one or several ranges of one dimension, that is, columns [lo, hi) of a matrix [outer, pitch] seen in row-major order.
The intersection of a shard and a range is at most three affine pieces (a partial first row, whole rows, a partial last
row), so that a plan never lists indices and can be made for a thousand ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gearshift.engine.placement import Placement
from gearshift.engine.split import Range, Split

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """`count` runs of `length` elements: from `source + i·source_stride` to `dest + i·dest_stride`.

    Source offsets count from the parameter's first element, destination offsets within the receiver's slice.
    """

    source: int
    source_stride: int
    dest: int
    dest_stride: int
    length: int
    count: int

    @property
    def elements(self) -> int:
        return self.length * self.count


@dataclass(frozen=True)
class Item:
    """Elements [low, high) of every rank's shard of a parameter, counted from the shard's start.

    The same range of all shards, so that in every exchange all ranks have something to send.
    """

    name: str
    low: int
    high: int


@dataclass(frozen=True)
class Traffic:
    """What one shift moves, in elements, `[N]` each: per rank what its slices hold, what it gets from other ranks and
    sends to others (in all, and over a host's border).

    `received` is the least that any way of shifting to this layout can do: what a rank needs and does not hold.
    """

    needed: Counts
    received: Counts
    received_between_hosts: Counts
    sent: Counts
    sent_between_hosts: Counts


@dataclass(frozen=True)
class ReshardPlan:
    """Buckets of items, and the geometry from which every rank's pieces follow.

    `shapes`: parameter name -> shape; `splits`: parameter name -> its split; `held`: parameters that every rank has
    whole (ZeRO-3 keeps small ones so), of which nothing travels. `largest_sent` and `largest_received` [N]: elements
    of each rank's largest exchange.
    """

    shapes: dict[str, tuple[int, ...]]
    splits: dict[str, Split]
    placement: Placement
    buckets: tuple[tuple[Item, ...], ...]
    held: frozenset[str]
    largest_sent: Counts
    largest_received: Counts

    @classmethod
    def build(
        cls,
        shapes: dict[str, tuple[int, ...]],
        splits: dict[str, Split],
        placement: Placement,
        bucket_elements: int = 16 << 20,
        held: Collection[str] = (),
    ) -> ReshardPlan:
        """In no exchange does a rank send or receive more than `bucket_elements` elements (or N, where that is more:
        one element of each shard is the least that can move)."""
        counting = _Counting(placement)
        cuts: dict[tuple[tuple[int, ...], Split], tuple[list[int], Counts]] = {}
        filling = _Filling(placement.ranks, bucket_elements)
        for name, shape in shapes.items():
            if name not in held:
                kind = shape, splits[name]
                if kind not in cuts:
                    cuts[kind] = counting.cut(*kind, bucket_elements)
                edges, moved = cuts[kind]
                for low, high, counts in zip(edges, edges[1:], moved, strict=False):
                    filling.add(Item(name, low, high), counts)
        buckets, (sent, received) = filling.done()
        return cls(shapes, splits, placement, buckets, frozenset(held), sent, received)

    @property
    def buffers(self) -> int:
        """How many exchanges are under way at once: one on the wire while the next is packed."""
        return min(2, len(self.buckets)) if self.placement.ranks > 1 else 0

    def peak(self, rank: int) -> int:
        """Elements of the rank's buffers, to send from and to receive in."""
        return self.buffers * int(self.largest_sent[rank] + self.largest_received[rank])

    def shard(self, name: str, rank: int) -> tuple[int, int]:
        """The flat range of a parameter that a ZeRO-3 rank holds (empty past the end)."""
        numel = math.prod(self.shapes[name])
        size = -(-numel // self.placement.ranks)
        return min(numel, rank * size), min(numel, (rank + 1) * size)

    def pieces(self, item: Item, sender: int, receiver: int) -> list[Piece]:
        """What `sender` holds of the item and `receiver` needs, in the order in which it travels."""
        start, stop = self.shard(item.name, sender)
        low, high = min(stop, start + item.low), min(stop, start + item.high)
        if low >= high:
            return []
        part = self.placement.part(receiver)
        return list(intersect(self.shapes[item.name], self.splits[item.name], part, low, high))

    def held_pieces(self, name: str, rank: int) -> list[Piece]:
        """A rank's slice of a parameter that it holds whole."""
        part = self.placement.part(rank)
        return list(intersect(self.shapes[name], self.splits[name], part, 0, math.prod(self.shapes[name])))

    def traffic(self) -> Traffic:
        """Counted for all ranks at once, once for each shape and split that the parameters have."""
        counting = _Counting(self.placement)
        total = Traffic(*(np.zeros(self.placement.ranks, dtype=np.int64) for _ in range(5)))
        kinds = Counter((self.shapes[n], self.splits[n], n in self.held) for n in self.shapes)
        for (shape, split, held), times in kinds.items():
            found = counting.traffic(shape, split)
            total.needed[:] += times * found.needed
            if not held:
                for name in ("received", "received_between_hosts", "sent", "sent_between_hosts"):
                    getattr(total, name)[:] += times * getattr(found, name)
        return total


class _Filling:
    """Items into buckets, in order: a new one where a rank would send or receive more than the bound."""

    def __init__(self, ranks: int, bound: int):
        self.bound = bound
        self.buckets: list[tuple[Item, ...]] = []
        self.items: list[Item] = []
        self.counts = np.zeros((2, ranks), dtype=np.int64)  # sent and received in the bucket that is being filled
        self.largest = np.zeros_like(self.counts)

    def add(self, item: Item, counts: Counts) -> None:
        together = self.counts + counts
        if self.items and together.max() > self.bound:
            self._close()
            together = counts
        self.items.append(item)
        self.counts = together

    def _close(self) -> None:
        self.buckets.append(tuple(self.items))
        np.maximum(self.largest, self.counts, out=self.largest)
        self.items = []

    def done(self) -> tuple[tuple[tuple[Item, ...], ...], Counts]:
        if self.items:
            self._close()
        return tuple(self.buckets), self.largest


class _Counting:
    """Elements that all ranks send and receive, from where the shards' borders lie in each part."""

    def __init__(self, placement: Placement):
        ranks = np.arange(placement.ranks)
        self.placement = placement
        self.part = np.array([placement.part(rank) for rank in range(placement.ranks)])
        self.host = ranks // placement.per_host
        self.on_host = np.zeros((self.host[-1] + 1, placement.tp_size), dtype=np.int64)  # holders of a part on a host
        np.add.at(self.on_host, (self.host, self.part), 1)
        self.first = self.host * placement.per_host
        self.last = np.minimum(self.first + placement.per_host, placement.ranks)

    def cut(self, shape: tuple[int, ...], split: Split, bound: int) -> tuple[list[int], Counts]:
        """A shard in equal ranges, of which no rank sends or receives more than `bound`: their edges [k + 1], and
        what each rank sends and receives of each [k, 2, N]."""
        numel, ranks = math.prod(shape), self.placement.ranks
        size = step = -(-numel // ranks)
        row = 1 if split.dim is None else math.prod(shape[split.dim :])
        while True:
            edges = [*range(0, size, step), size]
            borders = np.minimum(np.arange(ranks) * size + np.array(edges)[:, None], numel)
            held = np.diff(self._below(shape, split, borders), axis=1)  # [t, k, N]
            own = held[self.part, :, np.arange(ranks)].T
            sent = np.tensordot(self.on_host.sum(0), held, 1) - own
            moved = np.stack([sent, held.sum(2)[self.part].T - own], axis=1)
            excess = int(moved.max()) / bound
            if excess <= 1 or step == 1:
                return edges, moved
            # Whole rows where there are many: every part then has as much of a range as any other.
            step = max(1, -(-step // max(2, math.ceil(excess))))
            step -= step % row if step > row else 0

    def traffic(self, shape: tuple[int, ...], split: Split) -> Traffic:
        numel, ranks = math.prod(shape), np.arange(self.placement.ranks)
        edges = np.minimum(np.arange(len(ranks) + 1) * -(-numel // len(ranks)), numel)
        below = self._below(shape, split, edges)
        held = np.diff(below)  # [t, N]: what each rank's shard has of each part
        needed, own = below[self.part, -1], held[self.part, ranks]
        here = below[self.part, self.last] - below[self.part, self.first]
        holders = self.on_host.sum(0)
        return Traffic(
            needed=needed,
            received=needed - own,
            received_between_hosts=needed - here,
            sent=holders @ held - own,
            sent_between_hosts=((holders - self.on_host)[self.host] * held.T).sum(1),
        )

    def _below(self, shape: tuple[int, ...], split: Split, index: Counts) -> Counts:
        """`[t, ...]`: how much of each part lies before each of the given elements."""
        parts = range(self.placement.tp_size)
        return np.stack([elements_below(shape, split, part, index.ravel()).reshape(index.shape) for part in parts])


def elements_below(shape: tuple[int, ...], split: Split, part: int, index: Counts) -> Counts:
    """How many elements of a part of a tensor have a flat index below each of the given ones."""
    if split.dim is None:
        return index
    inner = math.prod(shape[split.dim + 1 :])
    rows, columns = np.divmod(index, shape[split.dim] * inner)
    below: Counts = np.zeros_like(index)
    for low, high in ((low * inner, high * inner) for low, high in split.ranges[part]):
        below += rows * (high - low) + np.clip(columns - low, 0, high - low)
    return below


def intersect(shape: tuple[int, ...], split: Split, part: int, low: int, high: int) -> Iterator[Piece]:
    """The flat range [low, high) of a tensor ∩ one part of it, as at most three pieces for each range of the part.

    Source offsets count from `low`'s own shard start in flat order, given as offsets from flat element 0 (the caller
    of `Piece.source` subtracts the shard's start); destinations count within the dense slice.
    """
    if split.dim is None:
        yield Piece(low, 0, low, 0, high - low, 1)
        return
    inner = math.prod(shape[split.dim + 1 :])
    pitch, width = shape[split.dim] * inner, split.width(part) * inner
    dest = 0  # where the range stands within a row of the slice
    for start, stop in split.ranges[part]:
        columns = (start * inner, stop * inner)
        yield from _columns(columns, pitch, dest, width, low, high)
        dest += columns[1] - columns[0]


def _columns(columns: Range, pitch: int, dest: int, width: int, low: int, high: int) -> Iterator[Piece]:
    """The flat range [low, high) of a matrix of `pitch` columns ∩ some of them, which go to columns from `dest` of a
    matrix of `width` columns."""
    lo, hi = columns
    if lo >= hi:
        return
    first, last = low // pitch, (high - 1) // pitch

    def run(row: int, start: int, stop: int) -> Iterator[Piece]:
        """Columns [start, stop) of one row, cut to the wanted ones."""
        start, stop = max(start, lo), min(stop, hi)
        if start < stop:
            yield Piece(row * pitch + start, 0, row * width + dest + start - lo, 0, stop - start, 1)

    if first == last:
        yield from run(first, low - first * pitch, high - first * pitch)
        return
    begin, end = first, last + 1  # whole rows [begin, end)
    if low > first * pitch:
        yield from run(first, low - first * pitch, pitch)
        begin += 1
    if high < (last + 1) * pitch:
        end -= 1
    if begin < end:
        yield Piece(begin * pitch + lo, pitch, begin * width + dest, width, hi - lo, end - begin)
    if high < (last + 1) * pitch:
        yield from run(last, 0, high - last * pitch)
