"""The shift: ZeRO-3 shards to tensor-parallel slices, bucket by bucket, each rank receiving only what it lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.engine.distributed import World
from gearshift.engine.memory import Releasable
from gearshift.engine.moves import Exchange, Move, exchanges, held_moves
from gearshift.engine.reshard import ReshardPlan

Copies = list[tuple[Move, Tensor]]  # what to read, and the view to write it into


@dataclass(frozen=True)
class Shards:
    """What a rank has of the newest weights, by name, flat and not copied: its shards, and parameters that are there
    whole."""

    own: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]


class Shift:
    """Runs a `ReshardPlan` on this rank: shards (read) into `slices` (dense, written, all of one dtype).

    A bucket is packed into a send buffer, exchanged, and unpacked from a receive buffer; the next one is packed while
    one is on the wire: on a GPU NCCL's stream, on a CPU a thread of gloo, with which packing overlaps where a core is
    free. `buffers`, two of each, hold `plan.peak(rank)` elements and are used again by every run. Views of what stays
    in its place are made once; not of the shards, which DeepSpeed may put elsewhere and a view would keep alive.
    """

    def __init__(self, plan: ReshardPlan, world: World, slices: Mapping[str, Tensor]):
        self.plan = plan
        (dtype,) = {tensor.dtype for tensor in slices.values()}
        lengths = int(plan.largest_sent[world.rank]), int(plan.largest_received[world.rank])
        out, into = ([torch.empty(n, dtype=dtype, device=world.device) for _ in range(plan.buffers)] for n in lengths)
        self.buffers = Releasable([*out, *into])
        parts = exchanges(plan, world.rank)
        self._held = _into(slices, held_moves(plan, world.rank))
        self._local = [_into(slices, part.local) for part in parts]
        self._buckets = [
            _Bucket(part, outgoing, incoming, slices)
            for part, outgoing, incoming in zip(parts, cycle(out), cycle(into), strict=False)
        ]
        self._elsewhere = [plan.placement.host(r) != plan.placement.host(world.rank) for r in range(world.size)]

    @torch.no_grad()
    def run(self, shards: Shards) -> Moved:
        """Collective over the world."""
        self.buffers.restore()
        _copy(shards.whole, self._held)
        following = iter(self._buckets)
        on_wire = _send(next(following, None), shards)
        for local in self._local:
            packed = _send(next(following, None), shards)
            _copy(shards.own, local)
            if on_wire is not None:
                on_wire.receive()
            on_wire = packed
        received = [(n, rank) for bucket in self._buckets for rank, n in enumerate(bucket.received)]
        return Moved(sum(n for n, _ in received), sum(n for n, rank in received if self._elsewhere[rank]))


@dataclass(frozen=True)
class Moved:
    """Bytes that came to this rank over the wire in a shift, in all and from other hosts."""

    received: int
    between_hosts: int


class _Bucket:
    """One exchange: the views that it copies into and out of its buffers.

    Travels as bytes: gloo knows fewer types than torch. `received` [N]: bytes from each rank.
    """

    def __init__(self, part: Exchange, outgoing: Tensor, incoming: Tensor, slices: Mapping[str, Tensor]):
        size = outgoing.element_size()
        self._send = [(move, move.write(outgoing)) for move in part.send]
        self._receive = [(move.read(incoming), move.write(slices[move.name])) for move in part.receive]
        self.sent, self.received = [n * size for n in part.sent], [n * size for n in part.received]
        self._outgoing = outgoing.view(torch.uint8)[: sum(self.sent)]
        self._incoming = incoming.view(torch.uint8)[: sum(self.received)]
        self._work: Any = None

    def send(self, shards: Mapping[str, Tensor]) -> None:
        _copy(shards, self._send)
        self._work = dist.all_to_all_single(self._incoming, self._outgoing, self.received, self.sent, async_op=True)

    def receive(self) -> None:
        self._work.wait()
        self._work = None
        for source, dest in self._receive:
            dest.copy_(source)


def _send(bucket: _Bucket | None, shards: Shards) -> _Bucket | None:
    if bucket is not None:
        bucket.send(shards.own)
    return bucket


def _into(slices: Mapping[str, Tensor], moves: list[Move]) -> Copies:
    return [(move, move.write(slices[move.name])) for move in moves]


def _copy(flat: Mapping[str, Tensor], copies: Copies) -> None:
    for move, dest in copies:
        dest.copy_(move.read(flat[move.name]))
