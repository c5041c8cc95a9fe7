"""Count, mean and sum of squared deviations of numbers that lie in several places, and their whitening."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

WHITEN_EPSILON = 1e-8


def merge_moments(moments: Tensor) -> Tensor:
    """`[K, 3] -> [3]`: the moments of K groups together, in their order (Chan et al. 1979)."""
    counts, means, m2s = moments.unbind(1)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1.0)
    m2 = m2s.sum() + (counts * (means - mean).square()).sum()
    return torch.stack([count, mean, m2])


def gather(moments: Tensor, group: str | None) -> Tensor:
    """`[1, 3] -> [ranks, 3]`, in their order. The group goes by its name, all that an operator can be given."""
    if group is None:
        return moments
    ranks = _resolve_process_group(cast(Any, group))
    parts = [torch.empty_like(moments) for _ in range(dist.get_world_size(ranks))]
    dist.all_gather(parts, moments, group=ranks)
    return torch.cat(parts)
