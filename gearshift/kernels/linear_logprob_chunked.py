"""`linear_logprob` over chunks of the vocabulary, on any device: forward in one sweep, backward by recomputing.

Each token keeps four numbers while the vocabulary passes by, its *state*: the maximum m of its logits z,
s = Σ e^{z−m}, the entropy numerator e = Σ e^{z−m}·(z−m), and the target's logit. Then log-prob = z_target − m − log s
and entropy = log s − e/s. States of two parts of the vocabulary merge into that of both: chunk by chunk, then rank by
rank. Letters: T tokens, H hidden, V vocabulary rows of this rank, C columns of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.kernels import checks
from gearshift.kernels.head import CHUNK, Chunks, Head, chunk_view

# e^FLOOR is 0 in fp32 and fp64: a difference z − m that is lower counts as this one, so that 0·−inf never arises.
FLOOR = -1e4


@dataclass(frozen=True)
class _Sweep:
    """What the autograd function is told beside its tensors."""

    head: Head
    entropy: bool
    group: dist.ProcessGroup | None
    vocab_start: int
    width: int


def chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor,
    head: Head,
    entropy: bool,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    width: int = CHUNK,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropy (or None), `[T]` each; see `linear_logprob`. `rows`: the tokens that have a target."""
    sweep = _Sweep(head, entropy, group, vocab_start, width)
    logprobs, entropies = _Chunked.apply(hidden, weight, bias, targets, rows, sweep)
    return logprobs, entropies


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor, sweep: _Sweep
    ) -> tuple[Tensor, Tensor | None]:
        dtype = checks.accumulation_dtype(hidden, weight, bias)
        local = targets[rows] - sweep.vocab_start
        state = _sweep(_compact(hidden, rows, dtype), weight, bias, local, sweep)
        if sweep.group is not None and rows.numel():
            state = _merge_ranks(state, sweep.group)
        top, total, numerator, target_logit = state.unbind(1)
        dead = total == 0
        zeros = torch.zeros(hidden.shape[0], dtype=dtype, device=hidden.device)
        logprobs = (target_logit - top - total.log()).masked_fill(dead, -torch.inf)
        # The weight is saved as itself: under ZeRO-3 its data is released after this forward and gathered before
        # backward, which a view or a copy would not see.
        ctx.save_for_backward(hidden, weight, bias, rows, local, state)
        ctx.sweep = sweep
        ctx.set_materialize_grads(False)
        if not sweep.entropy:
            return zeros.index_copy(0, rows, logprobs), None
        entropy = (total.log() - numerator / total).masked_fill(dead, 0.0)
        return zeros.index_copy(0, rows, logprobs), zeros.index_copy(0, rows, entropy)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, rows, local, state = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 6
        x = _compact(hidden, rows, state.dtype)
        slopes = _Slopes.of(state, grad_logprobs, grad_entropy, rows, ctx.sweep.head.slope)
        dx, dweight, dbias = _gradients(x, weight, bias, local, slopes, ctx.sweep, wanted)
        if dx is not None:
            if ctx.sweep.group is not None and rows.numel():
                dist.all_reduce(dx, group=ctx.sweep.group)
            dx = torch.zeros_like(hidden).index_copy_(0, rows, dx.to(hidden.dtype))
        return dx, dweight, dbias, None, None, None


def _compact(hidden: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows that have a target, so that what the others hold (NaN included) is never read."""
    return (hidden if rows.numel() == hidden.shape[0] else hidden[rows]).to(dtype)


def _sweep(x: Tensor, weight: Tensor, bias: Tensor | None, local: Tensor, sweep: _Sweep) -> Tensor:
    """The states `[T, 4]` over this rank's vocabulary. `local [T]`: each target's row in `weight`, if it is here."""
    # The target logit starts as NaN, "not seen": a target that nobody holds is then never a plausible number.
    state = x.new_tensor([-torch.inf, 0.0, 0.0, torch.nan]).repeat(x.shape[0], 1)
    chunks = Chunks(x, weight, bias, sweep.head, sweep.width)
    scratch = chunks.buffer() if sweep.entropy else None
    for span, _, z in chunks:
        state = merge(state, _chunk_state(z, local - span.start, span, scratch))
    return state


def _chunk_state(z: Tensor, column: Tensor, span: slice, scratch: Tensor | None) -> Tensor:
    """The states of one chunk; overwrites z. e is 0 without `scratch`, which is only needed for the entropy."""
    hit, column = _hits(column, z)
    target_logit = torch.where(hit, z.gather(1, column[:, None])[:, 0], torch.nan)
    top = z.amax(dim=1)
    z.sub_(_finite(top)[:, None])
    if scratch is None:
        total = z.exp_().sum(dim=1)
        return torch.stack([top, total, torch.zeros_like(total), target_logit], dim=1)
    z.clamp_(min=FLOOR)
    p = torch.exp(z, out=chunk_view(scratch, z.shape[0], span))
    return torch.stack([top, p.sum(dim=1), p.mul_(z).sum(dim=1), target_logit], dim=1)


def _hits(column: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each target's column lies in this chunk, and a column that is safe to read and write."""
    return (column >= 0) & (column < z.shape[1]), column.clamp(0, z.shape[1] - 1)


def _finite(top: Tensor) -> Tensor:
    """The maximum to subtract: 0 where all logits are −inf."""
    return top.masked_fill(top == -torch.inf, 0.0)


def merge(left: Tensor, right: Tensor) -> Tensor:
    """The states `[T, 4]` of two parts of the vocabulary, as one."""
    top = torch.maximum(left[:, 0], right[:, 0])
    total, numerator = torch.zeros_like(top), torch.zeros_like(top)
    for part in (left, right):
        # From the part's own maximum to the common one: z − m shrinks by `shift` in every term.
        shift = (part[:, 0] - _finite(top)).masked_fill(part[:, 0] == -torch.inf, 0.0).clamp(min=FLOOR)
        factor = shift.exp()
        total += factor * part[:, 1]
        numerator += factor * (part[:, 2] + shift * part[:, 1])
    return torch.stack([top, total, numerator, torch.fmax(left[:, 3], right[:, 3])], dim=1)


def _merge_ranks(state: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(state) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, state, group=group)
    merged = parts[0]
    for part in parts[1:]:  # in rank order, so that every rank gets the same bits
        merged = merge(merged, part)
    return merged


@dataclass(frozen=True)
class _Slopes:
    """dloss/dz of a token and column, from per-token numbers `[T]`, all but `tanh_slope` folded in.

    With p = e^{z−m} / s: dz = g·(1[target] − p) − g_H·p·(log p + H), and log p + H = z − m − e/s.
    """

    top: Tensor
    at_target: Tensor  # g
    of_p: Tensor  # −g / s, to be multiplied by e^{z−m}
    of_plogp: Tensor | None  # −g_H / s
    centre: Tensor  # e / s

    @classmethod
    def of(
        cls, state: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, rows: Tensor, slope: float
    ) -> _Slopes:
        top, total, numerator, _ = state.unbind(1)
        dead = total == 0
        total = total.masked_fill(dead, 1.0)

        def per_token(grad: Tensor) -> Tensor:
            return grad[rows].mul(slope).masked_fill(dead, 0.0)

        g = torch.zeros_like(top) if grad_logprobs is None else per_token(grad_logprobs)
        of_plogp = None if grad_entropy is None else -per_token(grad_entropy) / total
        return cls(_finite(top), g, -g / total, of_plogp, numerator / total)

    def logit_gradient(self, z: Tensor, column: Tensor, scratch: Tensor | None) -> Tensor:
        """`[T, C]`; overwrites z. `scratch` (of z's shape) is needed for the entropy's gradient only."""
        hit, column = _hits(column, z)
        z.sub_(self.top[:, None])
        if self.of_plogp is None:
            dz = z.exp_().mul_(self.of_p[:, None])
        else:
            z.clamp_(min=FLOOR)
            p = torch.exp(z, out=scratch)
            dz = z.sub_(self.centre[:, None]).mul_(self.of_plogp[:, None]).add_(self.of_p[:, None]).mul_(p)
        # One entry per token: no two additions meet, so the order of the threads cannot show.
        return dz.scatter_add_(1, column[:, None], torch.where(hit, self.at_target, 0.0)[:, None])


def _gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    local: Tensor,
    slopes: _Slopes,
    sweep: _Sweep,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX `[T, H]` in the accumulation dtype (this rank's part of the sum), dW and db in their inputs' dtypes."""
    dx = torch.zeros_like(x) if wanted[0] else None
    dweight = torch.empty_like(weight) if wanted[1] else None
    dbias = torch.empty_like(bias) if wanted[2] and bias is not None else None
    chunks = Chunks(x, weight, bias, sweep.head, sweep.width)
    scratch = None if slopes.of_plogp is None else chunks.buffer()
    for span, weight_rows, z in chunks:
        tanh_slope = sweep.head.tanh_slope(z)
        room = None if scratch is None else chunk_view(scratch, x.shape[0], span)
        dz = slopes.logit_gradient(z, local - span.start, room)
        if tanh_slope is not None:
            dz.mul_(tanh_slope)
        if dx is not None:
            dx.addmm_(dz, weight_rows)
        if dweight is not None:
            _product_into(dweight[span], dz.T, x)
        if dbias is not None:
            dbias[span] = dz.sum(dim=0)
    return dx, dweight, dbias


def _product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out ← left·right with one rounding: one product over all tokens, no sum in a narrower dtype."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)
