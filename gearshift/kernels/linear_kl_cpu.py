"""`linear_kl` on processors: both heads chunk by chunk of the vocabulary, in one sweep forward, recomputed backward.

Letters: T tokens, H and H' hidden, V vocabulary rows of this rank, C columns of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gearshift.kernels import checks
from gearshift.kernels.head import Chunks, Head, chunk_view, spans
from gearshift.kernels.linear_logprob_cpu import (
    Gradients,
    GradientSums,
    Slopes,
    add_at_target,
    block_rows,
    rows_of,
    target_logit,
    weighted_sum,
)
from gearshift.kernels.states import FLOOR, empty_states, finite, merge

# Columns of a chunk. At T=2048, H=768, V=50257 the forward takes 1.08 times as long as two `linear_logprob`; with
# chunks of 4,096 columns, all tokens at once, it took 1.3 times.
WIDTH = 2048


@dataclass(frozen=True)
class Side:
    """One of the two heads: `x [T, H]`, `weight [V, H]`, `bias [V]` or None."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    head: Head

    def chunks(self, dtype: torch.dtype, width: int) -> Chunks:
        return Chunks(self.x.to(dtype), self.weight, self.bias, self.head, width)


def state(policy: Side, reference: Side, local: Tensor, entropy: bool, width: int = WIDTH) -> Tensor:
    """The states `[T, 8]` over this rank's vocabulary, in fp32 (fp64 where an input is).

    `local [T]`: each target's row in the weights, if it is here. Without `entropy` its numerators are 0.
    """
    dtype = both_dtypes(policy, reference)
    ours, theirs = policy.chunks(dtype, width), reference.chunks(dtype, width)
    found, scratch = empty_states(local.shape[0], 8, ours.x), ours.buffer()
    for span in spans(policy.weight.shape[0], width):
        z, y = ours.logits(span, ours.rows(span)), theirs.logits(span, theirs.rows(span))
        column = local - span.start
        parts = [
            _chunk_state(z[r], y[r], column[r], entropy, chunk_view(scratch, len(z[r]), span))
            for r in spans(len(z), block_rows(width))
        ]
        found = merge(torch.stack([found, *([torch.cat(parts)] if parts else [])]))
    return found


def gradients(
    policy: Side,
    reference: Side,
    local: Tensor,
    slopes: KlSlopes,
    wanted: tuple[bool, bool, bool],
    width: int = WIDTH,
) -> Gradients:
    """The policy's dX `[T, H]` in fp32 or fp64 (this rank's part of the sum), dW and db in their inputs' dtypes."""
    dtype = both_dtypes(policy, reference)
    ours, theirs = policy.chunks(dtype, width), reference.chunks(dtype, width)
    sums, scratch = GradientSums(ours.x, policy.weight, policy.bias, wanted), ours.buffer()
    blocks = [(r, rows_of(slopes, r)) for r in spans(local.shape[0], block_rows(width))]
    for span in spans(policy.weight.shape[0], width):
        rows, column = ours.rows(span), local - span.start
        z, y = ours.logits(span, rows), theirs.logits(span, theirs.rows(span))
        for r, block in blocks:
            tanh_slope = policy.head.tanh_slope(z[r])
            dz = block.logit_gradient(z[r], y[r], column[r], chunk_view(scratch, len(z[r]), span))
            if tanh_slope is not None:
                dz.mul_(tanh_slope)
        sums.add(span, rows, z)
    return sums.dx, sums.dweight, sums.dbias


def both_dtypes(policy: Side, reference: Side) -> torch.dtype:
    return checks.accumulation_dtype(policy.x, policy.weight, policy.bias, reference.x, reference.weight)


def _chunk_state(z: Tensor, y: Tensor, column: Tensor, entropy: bool, scratch: Tensor) -> Tensor:
    """The states of one chunk; overwrites z and y."""
    targets = target_logit(z, column), target_logit(y, column)
    top, ref_top = z.amax(dim=1), y.amax(dim=1)
    z.sub_(finite(top)[:, None])
    y.sub_(finite(ref_top)[:, None])
    p = torch.exp(z, out=scratch)
    total = p.sum(dim=1)
    numerator = weighted_sum(p, z) if entropy else torch.zeros_like(total)
    gap = weighted_sum(p, z.sub_(y))
    ref_total = y.exp_().sum(dim=1)
    return torch.stack([top, total, numerator, targets[0], ref_top, ref_total, targets[1], gap], dim=1)


@dataclass(frozen=True)
class KlSlopes:
    """dloss/dproduct of the policy, from per-token numbers `[T]`: those of `Slopes`, and the KL's.

    With p = e^{z−m} / s and q = e^{y−n} / r, the KL adds g·p·((log p − log q) − KL), and that difference is
    (z − m) − (y − n) + offset. A token whose KL is infinite, or that has no distribution, has no slope of it.
    """

    policy: Slopes
    ref_top: Tensor
    of_kl: Tensor  # g / s
    offset: Tensor  # log r − log s − KL

    @classmethod
    def of(
        cls,
        state: Tensor,
        slope: float,
        grad_kl: Tensor | None,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
    ) -> KlSlopes:
        """`state [T, 8]` and the gradients `[T]` of the tokens that have a target; `slope`: the policy head's."""
        total, ref_total, kl = state[:, 1], state[:, 5], divergence(state)
        without = (total == 0) | ~kl.isfinite()
        grad = torch.zeros_like(kl) if grad_kl is None else grad_kl
        of_kl = (grad * slope / total).masked_fill(without, 0.0)
        offset = (ref_total.log() - total.log() - kl).masked_fill(without, 0.0)
        policy = Slopes.of(state[:, :4], slope, grad_logprobs, grad_entropy)
        return cls(policy, finite(state[:, 4]), of_kl, offset)

    def logit_gradient(self, z: Tensor, y: Tensor, column: Tensor, scratch: Tensor) -> Tensor:
        """`[T, C]`, in the place of z; overwrites y and scratch (of z's shape)."""
        ours = self.policy
        of_plogp = torch.zeros_like(self.of_kl) if ours.of_plogp is None else ours.of_plogp
        p = torch.exp(z.sub_(ours.top[:, None]).clamp_(min=FLOOR), out=scratch)
        # Finite, so that a token that neither would draw adds 0·finite; where p > 0 the KL is infinite: no slope.
        y.sub_(self.ref_top[:, None]).clamp_(min=-1e30)
        constant = ours.of_p - of_plogp * ours.centre + self.of_kl * self.offset
        dz = z.mul_((of_plogp + self.of_kl)[:, None]).addcmul_(y, self.of_kl[:, None], value=-1.0)
        return add_at_target(dz.add_(constant[:, None]).mul_(p), column, ours.at_target)


def divergence(state: Tensor) -> Tensor:
    """KL(policy ‖ reference) `[T]` of whole vocabularies' states `[T, 8]`; 0 where the policy has no distribution."""
    total, ref_total, gap = state[:, 1], state[:, 5], state[:, 7]
    dead = total == 0
    kl = gap / total - total.log() + ref_total.log()
    kl = torch.where(gap == torch.inf, torch.inf, kl)  # not inf − inf where the reference has no distribution
    return kl.masked_fill(dead, 0.0)
