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
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gearshift.engine.placement import Placement
from gearshift.engine.split import Range, Split

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """`count` runs of `length` elements: from `source + i·source_stride` to `dest + i·dest_stride`.

    Source offsets count within the sender's shard, destination offsets within the receiver's slice.
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
    """A contiguous range of a parameter's flat elements: small enough for one bucket."""

    name: str
    low: int
    high: int


@dataclass(frozen=True)
class Traffic:
    """What one shift moves, in elements, `[N]` each: per rank what its slices hold, what it gets from other ranks (in
    all, and from other hosts), what it sends to others.

    `received` is the least that any way of shifting to this layout can do: what a rank needs and does not hold.
    """

    needed: Counts
    received: Counts
    received_between_hosts: Counts
    sent: Counts


@dataclass(frozen=True)
class ReshardPlan:
    """Buckets of items, and the geometry from which every rank's pieces follow.

    `shapes`: parameter name -> shape; `splits`: parameter name -> its split.
    """

    shapes: dict[str, tuple[int, ...]]
    splits: dict[str, Split]
    placement: Placement
    buckets: tuple[tuple[Item, ...], ...]

    @classmethod
    def build(
        cls,
        shapes: dict[str, tuple[int, ...]],
        splits: dict[str, Split],
        placement: Placement,
        bucket_elements: int = 16 << 20,
    ) -> ReshardPlan:
        """No rank's bucket holds more than `bucket_elements` elements to receive (of a parameter larger than that,
        consecutive ranges)."""
        buckets: list[tuple[Item, ...]] = []
        current: list[Item] = []
        room = bucket_elements
        for name, shape in shapes.items():
            numel, low = math.prod(shape), 0
            while low < numel:
                if room == 0:
                    buckets.append(tuple(current))
                    current, room = [], bucket_elements
                high = min(numel, low + room)
                current.append(Item(name, low, high))
                room -= high - low
                low = high
        if current:
            buckets.append(tuple(current))
        return cls(shapes, splits, placement, tuple(buckets))

    def shard(self, name: str, rank: int) -> tuple[int, int]:
        """The flat range of a parameter that a ZeRO-3 rank holds (empty past the end)."""
        numel = math.prod(self.shapes[name])
        size = -(-numel // self.placement.ranks)
        return min(numel, rank * size), min(numel, (rank + 1) * size)

    def pieces(self, item: Item, sender: int, receiver: int) -> list[Piece]:
        """What `sender` holds of the item and `receiver` needs, in the order in which it travels."""
        shard_low, shard_high = self.shard(item.name, sender)
        low, high = max(shard_low, item.low), min(shard_high, item.high)
        if low >= high:
            return []
        part = self.placement.part(receiver)
        return list(intersect(self.shapes[item.name], self.splits[item.name], part, low, high))

    def traffic(self) -> Traffic:
        """Counted for all ranks at once, once for each shape and split that the parameters have."""
        ranks = self.placement.ranks
        part = np.array([self.placement.part(rank) for rank in range(ranks)])
        first = np.arange(ranks) // self.placement.per_host * self.placement.per_host
        last = np.minimum(first + self.placement.per_host, ranks)
        holders = np.bincount(part, minlength=self.placement.tp_size)
        total = Traffic(*(np.zeros(ranks, dtype=np.int64) for _ in range(4)))
        for (shape, split), times in Counter((self.shapes[n], self.splits[n]) for n in self.shapes).items():
            numel = math.prod(shape)
            edges = np.minimum(np.arange(ranks + 1) * -(-numel // ranks), numel)
            below = np.stack([elements_below(shape, split, p, edges) for p in range(self.placement.tp_size)])
            held = np.diff(below)  # [t, N]: what each rank's shard has of each part
            needed, own = below[part, -1], held[part, np.arange(ranks)]
            on_host = below[part, last] - below[part, first]
            for counts, found in (
                (total.needed, needed),
                (total.received, needed - own),
                (total.received_between_hosts, needed - on_host),
                (total.sent, holders @ held - own),
            ):
                counts += times * found
        return total


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
