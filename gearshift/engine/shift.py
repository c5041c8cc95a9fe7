"""The shift: ZeRO-3 shards to tensor-parallel slices, bucket by bucket, each rank receiving only what it lacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.engine.adapters import is_adapter, merge_into, plain_name
from gearshift.engine.distributed import World
from gearshift.engine.reshard import Item, Piece, ReshardPlan


@dataclass(frozen=True)
class _Move:
    """A piece of a named parameter, offsets within this rank's shard (or slice)."""

    name: str
    piece: Piece
    shard_start: int

    def source(self, shards: dict[str, Tensor]) -> Tensor:
        """A strided view [count, length] of the sender's shard."""
        p = self.piece
        flat = shards[self.name]
        offset = flat.storage_offset() + p.source - self.shard_start
        return flat.as_strided((p.count, p.length), (p.source_stride, 1), offset)

    def bytes(self, slices: dict[str, Tensor]) -> int:
        return self.piece.elements * slices[self.name].element_size()

    def dest(self, slices: dict[str, Tensor]) -> Tensor:
        p = self.piece
        dense = slices[self.name]
        return dense.as_strided((p.count, p.length), (p.dest_stride, 1), dense.storage_offset() + p.dest)


class Shift:
    """Runs a `ReshardPlan` on this rank: `shards` (flat, read) into `slices` (dense, written).

    The moves are listed once, since shapes do not change; each run packs, exchanges and unpacks.
    """

    def __init__(self, plan: ReshardPlan, world: World):
        self.plan, self.world = plan, world
        rank, ranks = world.rank, range(plan.placement.ranks)
        self._local = [self._moves(bucket, rank, rank) for bucket in plan.buckets]
        self._send = [[self._moves(b, rank, other) if other != rank else [] for other in ranks] for b in plan.buckets]
        self._receive = [
            [self._moves(b, other, rank) if other != rank else [] for other in ranks] for b in plan.buckets
        ]

    def _moves(self, bucket: tuple[Item, ...], sender: int, receiver: int) -> list[_Move]:
        return [
            _Move(item.name, piece, self.plan.shard(item.name, sender)[0])
            for item in bucket
            for piece in self.plan.pieces(item, sender, receiver)
        ]

    @torch.no_grad()
    def run(self, shards: dict[str, Tensor], slices: dict[str, Tensor]) -> int:
        """Collective over the world. Returns the bytes that this rank received."""
        received = 0
        for local, send, receive in zip(self._local, self._send, self._receive, strict=True):
            for move in local:
                move.dest(slices).copy_(move.source(shards))
            if self.world.size > 1:
                received += self._exchange(shards, slices, send, receive)
        return received

    def _exchange(
        self, shards: dict[str, Tensor], slices: dict[str, Tensor], send: list[list[_Move]], receive: list[list[_Move]]
    ) -> int:
        """One bucket over the wire, as bytes: gloo knows fewer types than torch, parameters may differ in theirs."""
        outgoing = [_bytes(move.source(shards).to(self.world.device)) for moves in send for move in moves]
        packed = torch.cat(outgoing) if outgoing else torch.empty(0, dtype=torch.uint8, device=self.world.device)
        sent = [sum(m.bytes(slices) for m in moves) for moves in send]
        got = [sum(m.bytes(slices) for m in moves) for moves in receive]
        arrived = torch.empty(sum(got), dtype=torch.uint8, device=self.world.device)
        dist.all_to_all_single(arrived, packed, got, sent)
        offset = 0
        for move in (m for moves in receive for m in moves):
            dest, size = move.dest(slices), move.bytes(slices)
            # A copy of its own: a view as a wider type needs an aligned start.
            dest.copy_(arrived[offset : offset + size].clone().view(dest.dtype).view(dest.shape))
            offset += size
        return arrived.numel()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def zero_shards(module: Any) -> dict[str, Tensor]:
    """Each parameter's own flat ZeRO-3 shard on this rank, after a step the authoritative copy (views, no copies but
    where an adapter is merged). Collective for a model with adapters."""
    shards = {plain_name(name): p.ds_tensor for name, p in module.named_parameters() if not is_adapter(name)}
    return merge_into(shards, module, dist.get_rank())
