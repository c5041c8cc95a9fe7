"""One rank's part in a plan: what it copies where, exchange by exchange. Numbers only: no weights, no process group.

A packed buffer holds a block for each other rank, in rank order; a block, the pieces of the bucket's items one after
the other. Pieces of one form that follow each other at equal distances are one move: among 64 ranks a parameter then
takes a few copies and not hundreds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from torch import Tensor

from gearshift.engine.reshard import Item, Piece, ReshardPlan

Block = list[tuple[str, Piece]]


@dataclass(frozen=True)
class Move:
    """`sizes` (pieces, rows, elements) of a parameter, from `source` to `dest` and on at these strides.

    Counted in elements of two flat tensors. The elements of a row lie together in both.
    """

    name: str
    sizes: tuple[int, int, int]
    source: int
    source_strides: tuple[int, int]
    dest: int
    dest_strides: tuple[int, int]

    def read(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self.sizes, (*self.source_strides, 1), flat.storage_offset() + self.source)

    def write(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self.sizes, (*self.dest_strides, 1), flat.storage_offset() + self.dest)


@dataclass(frozen=True)
class Exchange:
    """One bucket on one rank: `send` from shards into the buffer, `local` from shards into slices, `receive` from the
    buffer into slices.

    `sent` and `received` [N]: elements to and from each rank, as they lie in the buffers.
    """

    send: list[Move]
    local: list[Move]
    receive: list[Move]
    sent: list[int]
    received: list[int]


def exchanges(plan: ReshardPlan, rank: int) -> list[Exchange]:
    """The rank's part in each bucket of the plan."""
    blocks, parts = _Blocks(plan), [plan.placement.part(other) for other in range(plan.placement.ranks)]
    return [_exchange(blocks, bucket, rank, parts) for bucket in plan.buckets]


def _exchange(blocks: _Blocks, bucket: tuple[Item, ...], rank: int, parts: list[int]) -> Exchange:
    """`parts` [N]: the part that each rank holds. All holders of a part are sent the same block."""
    out = {part: blocks.of(bucket, rank, part) for part in sorted(set(parts))}
    into = [blocks.of(bucket, other, parts[rank]) if other != rank else [] for other in range(len(parts))]
    sent = [_elements(out[part]) if other != rank else 0 for other, part in enumerate(parts)]
    starts = list(accumulate(sent, initial=0))
    packing: list[Move] = []
    for part, block in out.items():
        packing += _packing(block, [starts[o] for o, p in enumerate(parts) if p == part and o != rank])
    return Exchange(
        send=merged(packing),
        local=merged(_copying(out[parts[rank]])),
        receive=merged(_unpacking(into)),
        sent=sent,
        received=[_elements(block) for block in into],
    )


def held_moves(plan: ReshardPlan, rank: int) -> list[Move]:
    """From the parameters that the rank holds whole into its slices."""
    return list(_copying([(name, piece) for name in sorted(plan.held) for piece in plan.held_pieces(name, rank)]))


class _Blocks:
    """What of a bucket a sender has of a part, sources counted from its shards; once for parameters of one kind."""

    def __init__(self, plan: ReshardPlan):
        self._plan, self._holders = plan, plan.placement.group(0)
        numbers: dict[Any, int] = {}
        self._kind = {n: numbers.setdefault((plan.shapes[n], plan.splits[n]), len(numbers)) for n in plan.shapes}
        self._known: dict[Any, list[Piece]] = {}

    def of(self, bucket: tuple[Item, ...], sender: int, part: int) -> Block:
        return [(item.name, piece) for item in bucket for piece in self._pieces(item, sender, part)]

    def _pieces(self, item: Item, sender: int, part: int) -> list[Piece]:
        key = self._kind[item.name], item.low, item.high, sender, part
        if key not in self._known:
            start = self._plan.shard(item.name, sender)[0]
            found = self._plan.pieces(item, sender, self._holders[part])
            self._known[key] = [replace(piece, source=piece.source - start) for piece in found]
        return self._known[key]


def _elements(block: Block) -> int:
    return sum(piece.elements for _, piece in block)


def _copying(block: Block) -> Iterator[Move]:
    for name, p in block:
        yield Move(name, (1, p.count, p.length), p.source, (0, p.source_stride), p.dest, (0, p.dest_stride))


def _packing(block: Block, starts: list[int]) -> Iterator[Move]:
    """The block to each of the places in the buffer that `starts` names."""
    for first, count, (step,) in progressions([(start,) for start in starts]):
        offset = starts[first]
        for name, p in block:
            yield Move(name, (count, p.count, p.length), p.source, (0, p.source_stride), offset, (step, p.length))
            offset += p.elements


def _unpacking(blocks: list[Block]) -> Iterator[Move]:
    offset = 0
    for block in blocks:
        for name, p in block:
            yield Move(name, (1, p.count, p.length), offset, (0, p.length), p.dest, (0, p.dest_stride))
            offset += p.elements


def merged(moves: Iterable[Move]) -> list[Move]:
    """The same moves, single pieces of one form at equal distances taken together."""
    found: list[Move] = []
    alike: dict[Any, list[Move]] = {}
    for move in moves:
        if move.sizes[0] > 1:
            found.append(move)
        else:
            alike.setdefault((move.name, move.sizes, move.source_strides[1], move.dest_strides[1]), []).append(move)
    for form in alike.values():
        for first, count, (source, dest) in progressions([(move.source, move.dest) for move in form]):
            move = form[first]
            found.append(
                replace(
                    move,
                    sizes=(count, *move.sizes[1:]),
                    source_strides=(source, move.source_strides[1]),
                    dest_strides=(dest, move.dest_strides[1]),
                )
            )
    return found


def progressions(points: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """The points, in order, as arithmetic progressions: index of the first, how many, and their distance.

    None of them goes backwards, which strides cannot.
    """
    first = 0
    while first < len(points):
        last, step = first, (0,) * len(points[first])
        if first + 1 < len(points) and min(_distance(points[first], points[first + 1])) >= 0:
            step = _distance(points[first], points[first + 1])
            while last + 1 < len(points) and _distance(points[last], points[last + 1]) == step:
                last += 1
        yield first, last - first + 1, step
        first = last + 1


def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(y - x for x, y in zip(a, b, strict=True))
