"""Rows of several ranks brought together."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.engine.batches import Rows

R = TypeVar("R", bound=Rows)


def gather_rows(batch: R, group: dist.ProcessGroup | None) -> tuple[R, list[int]]:
    """The rows of all ranks of the group in rank order, and how many each brought. Collective over the group.

    Ranks may bring different numbers of rows and different widths: what is narrower is padded with 0 on the right.
    `group` None: this process alone.
    """
    if group is None or dist.get_world_size(group) == 1:
        return batch, [len(batch)]
    fields = [f.name for f in dataclasses.fields(batch)]
    tensors = [getattr(batch, name) for name in fields]
    widths_here = [t.shape[1] if t.dim() == 2 else 1 for t in tensors]
    shape = torch.tensor([len(batch), *widths_here], device=tensors[0].device)
    shapes = [torch.empty_like(shape) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes, shape, group=group)
    counts = [int(s[0]) for s in shapes]
    widths = torch.stack(shapes).amax(0)[1:].tolist()
    gathered = [_gather(t, max(counts), int(w), counts, group) for t, w in zip(tensors, widths, strict=True)]
    return type(batch)(*gathered), counts


def _gather(tensor: Tensor, rows: int, width: int, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """One field, `[B]` or `[B, W]`, of all ranks; sent as bytes, since gloo knows fewer types than torch."""
    if tensor.dim() > 2:
        raise ValueError(f"rows of up to one dimension can be gathered, got a tensor of shape {list(tensor.shape)}")
    mine = tensor.new_zeros(rows, width)
    mine[: len(tensor), : tensor.shape[1] if tensor.dim() == 2 else 1] = (
        tensor if tensor.dim() == 2 else tensor[:, None]
    )
    raw = mine.view(torch.uint8)
    parts = [torch.empty_like(raw) for _ in counts]
    dist.all_gather(parts, raw, group=group)
    whole = torch.cat([part.view(tensor.dtype)[:count] for part, count in zip(parts, counts, strict=True)])
    return whole if tensor.dim() == 2 else whole[:, 0]
