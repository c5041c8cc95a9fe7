"""What a sweep over a vocabulary keeps of each token, and how parts of a vocabulary become one.

A *state* is a row of numbers per token. Of one head (`linear_logprob`), four: the maximum m of the logits z,
s = Σ e^{z−m}, the entropy's numerator e = Σ e^{z−m}·(z−m), and the target's logit (NaN where no part has held it).
Then log-prob = z_target − m − log s and entropy = log s − e/s. Of two heads (`linear_kl`), eight: those of the policy,
then n, r = Σ e^{y−n} and the target's logit of the reference's logits y, and D = Σ e^{z−m}·((z−m) − (y−n)); then
KL = D/s − log s + log r.

Letters: P parts (chunks, splits or ranks), T tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from gearshift.kernels import checks

# e^FLOOR is 0 in fp32 and fp64: a difference z − m that is lower counts as this one, so that 0·−inf never arises.
FLOOR = -1e4


def empty_states(tokens: int, numbers: int, like: Tensor) -> Tensor:
    """`[T, 4 or 8]`: of no vocabulary at all."""
    one = [-torch.inf, 0.0, 0.0, torch.nan]
    return like.new_tensor(one if numbers == 4 else [*one, -torch.inf, 0.0, torch.nan, 0.0]).repeat(tokens, 1)


def finite(top: Tensor) -> Tensor:
    """The maximum to subtract: 0 where all logits are −inf."""
    return top.masked_fill(top == -torch.inf, 0.0)


def merge(parts: Tensor) -> Tensor:
    """The states `[P, T, 4 or 8]` of P parts of the vocabulary, as one `[T, 4 or 8]`. The same bits on every rank."""
    top, factor, shift = _rescaling(parts[..., 0])
    total, numerator = parts[..., 1], parts[..., 2]
    merged = [top, (factor * total).sum(0), (factor * (numerator + shift * total)).sum(0), _seen(parts[..., 3])]
    if parts.shape[-1] == 8:
        ref_top, ref_factor, ref_shift = _rescaling(parts[..., 4])
        gap = parts[..., 7]
        moved = factor * (gap + (shift - ref_shift) * total)
        # A token that the policy may draw and the reference never: infinite, however little of p this part holds.
        gap = torch.where(gap == torch.inf, torch.inf, moved).sum(0)
        merged += [ref_top, (ref_factor * parts[..., 5]).sum(0), _seen(parts[..., 6]), gap]
    return torch.stack(merged, dim=-1)


def _rescaling(tops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From each part's own maximum `[P, T]` to the common one `[T]`: e^shift, and the shift of every z − m."""
    top = tops.amax(0)
    shift = (tops - finite(top)).masked_fill(tops == -torch.inf, 0.0)
    return top, shift.exp(), shift


def _seen(logits: Tensor) -> Tensor:
    """The target's logit from the part that holds it; NaN where none does."""
    found = logits[0]
    for other in logits[1:]:
        found = torch.fmax(found, other)
    return found


class Shards:
    """The ranks that a vocabulary is split over. `name` None: this process has all of it.

    Process groups go by their names here, since that is what an operator of `torch.library` can be given.
    """

    # (group, first id, rows) that were once seen to fit together: checking again would cost a GPU a synchronisation.
    _known: set[tuple[str, int, int]] = set()  # noqa: RUF012

    def __init__(self, name: str | None, first: int, rows: int):
        self.group = None if name is None else _resolve_process_group(cast(Any, name))
        self.key = (name or "", first, rows)

    def merge(self, state: Tensor, targets: Tensor) -> Tensor:
        """The whole vocabulary's states. One all-gather, which also carries each rank's range of ids.

        Raises ValueError on every rank when the ranges overlap or leave a gap, or a target is past the last.
        """
        if self.group is None:
            return state
        _, first, rows = self.key
        # The range in two numbers below 2^16 each: exact in fp32 whatever the vocabulary.
        own = state.new_tensor([first >> 16, first & 0xFFFF, rows >> 16, rows & 0xFFFF])
        sent = torch.cat([state.flatten(), own])
        parts = [torch.empty_like(sent) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, sent, group=self.group)
        every = torch.stack(parts)
        if not state.is_cuda or self.key not in self._known:
            self._check(every[:, -4:].long().tolist(), targets)
            self._known.add(self.key)
        return merge(every[:, :-4].view(len(parts), *state.shape))

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.group is not None and tensor.numel():
            dist.all_reduce(tensor, group=self.group)
        return tensor

    @staticmethod
    def _check(ranges: list[list[int]], targets: Tensor) -> None:
        end, owner = 0, -1
        for rank, (a, b, c, d) in enumerate(ranges):
            first, rows = (a << 16) + b, (c << 16) + d
            if not rows:
                continue
            before = f"rank {owner} ends at {end}" if owner >= 0 else "a vocabulary starts at 0"
            kind = "overlap" if first < end else "leave a gap"
            checks.require(
                first == end, f"the ranks' parts of the vocabulary {kind}: rank {rank} starts at {first}, {before}"
            )
            end, owner = first + rows, rank
        if targets.numel():
            last = int(targets.max())
            checks.require(last < end, f"targets must be below {end}, the ranks' vocabulary together, got {last}")
