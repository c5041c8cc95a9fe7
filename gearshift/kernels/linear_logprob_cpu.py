"""`linear_logprob` on processors, chunk by chunk of the vocabulary: one sweep forward, recomputed backward.

Letters: T tokens, H hidden, V vocabulary rows of this rank, C columns of a chunk.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from gearshift.kernels import checks, native
from gearshift.kernels.head import CHUNK, Chunks, Head, spans
from gearshift.kernels.states import FLOOR, empty_states, finite, merge
from gearshift.kernels.weight_sums import WeightSum

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
S = TypeVar("S")

# Logits worked on together, 1 MiB in fp32: half of a second-level cache. At T=2048, H=768, V=50257 forward and backward
# take 1.3 of three plain products, 1.36 without blocks; with the entropy 1.37 and 1.52.
BLOCK_ELEMENTS = 256 << 10


def state(
    x: Tensor, weight: Tensor, bias: Tensor | None, local: Tensor, head: Head, entropy: bool, width: int = CHUNK
) -> Tensor:
    """The states `[T, 4]` of `x [T, H]` over this rank's vocabulary, in fp32 (fp64 where an input is).

    `local [T]`: each target's row in `weight`, if it is here. Without `entropy` the numerators are 0.
    """
    x = x.to(checks.accumulation_dtype(x, weight, bias))
    found = empty_states(x.shape[0], 4, x)
    chunks = Chunks(x, weight, bias, head, width)
    compiled = native.serves(x)
    scratch = chunks.buffer() if entropy and not compiled else None
    for span in spans(weight.shape[0], width):
        z, column = chunks.logits(span, chunks.rows(span)), local - span.start
        if compiled:
            found = merge(torch.stack([found, _chunk_state(z, column, entropy)]))
            continue
        parts = [_block_state(z[r], column[r], room(scratch, z[r])) for r in spans(len(z), block_rows(width))]
        found = merge(torch.stack([found, torch.cat(parts)])) if parts else found
    return found


def gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    local: Tensor,
    head: Head,
    slopes: Slopes,
    wanted: tuple[bool, bool, bool],
    width: int = CHUNK,
    total: WeightSum | None = None,
) -> Gradients:
    """dX `[T, H]` in fp32 or fp64 (this rank's part of the sum), dW and db in their inputs' dtypes. `total`: what dW
    joins where it is not `wanted`."""
    x = x.to(checks.accumulation_dtype(x, weight, bias))
    sums = GradientSums(x, weight, bias, wanted, total)
    chunks = Chunks(x, weight, bias, head, width)
    compiled = native.serves(x)
    scratch = None if slopes.of_plogp is None or compiled else chunks.buffer()
    blocks = [(r, rows_of(slopes, r)) for r in spans(x.shape[0], max(1, len(x)) if compiled else block_rows(width))]
    for span in spans(weight.shape[0], width):
        rows = chunks.rows(span)
        z, column = chunks.logits(span, rows), local - span.start
        for r, block in blocks:
            tanh_slope = head.tanh_slope(z[r])
            dz = block.logit_gradient(z[r], column[r], room(scratch, z[r]))
            if tanh_slope is not None:
                dz.mul_(tanh_slope)
        sums.add(span, rows, z)
    if total is not None:
        total.done()
    return sums.dx, sums.dweight, sums.dbias


def block_rows(width: int) -> int:
    """Tokens of a chunk that are worked on together: so few that they stay in the cache from one step to the next."""
    return max(1, BLOCK_ELEMENTS // width)


def rows_of(slopes: S, rows: slice) -> S:
    """The slopes of some tokens."""
    fields = {f.name: getattr(slopes, f.name) for f in dataclasses.fields(cast(Any, slopes))}
    return type(slopes)(**{
        name: None if value is None else rows_of(value, rows) if dataclasses.is_dataclass(value) else value[rows]
        for name, value in fields.items()
    })  # fmt: skip


def _chunk_state(z: Tensor, column: Tensor, entropy: bool) -> Tensor:
    """The states of all tokens over one chunk, by the compiled library; reads z."""
    states = z.new_empty(len(z), 4)
    given = z.shape[1], entropy, *map(native.pointer, (z, column.contiguous(), states))
    native.spread("logit_states", "iippp", len(z), z.numel(), *given)
    return states


def _block_state(z: Tensor, column: Tensor, scratch: Tensor | None) -> Tensor:
    """The states of some tokens over one chunk; overwrites z and scratch."""
    target = target_logit(z, column)
    top = z.amax(dim=1)
    z.sub_(finite(top)[:, None])
    if scratch is None:
        total = z.exp_().sum(dim=1)
        return torch.stack([top, total, torch.zeros_like(total), target], dim=1)
    p = torch.exp(z, out=scratch)
    return torch.stack([top, p.sum(dim=1), weighted_sum(p, z), target], dim=1)


def weighted_sum(p: Tensor, values: Tensor) -> Tensor:
    """Σ p·values of each row, where p = 0 adds 0 even if the value is infinite."""
    total = torch.linalg.vecdot(p, values)
    if not bool(total.isnan().any()):
        return total
    return (values * p).masked_fill_(p == 0, 0.0).sum(dim=1)  # a logit of −inf: rare enough to look twice


def target_logit(z: Tensor, column: Tensor) -> Tensor:
    """`[T]`: the target's logit where its column lies in this chunk, else NaN."""
    hit, column = hits(column, z)
    return torch.where(hit, z.gather(1, column[:, None])[:, 0], torch.nan)


def hits(column: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each target's column lies in this chunk, and a column that is safe to read and write."""
    return (column >= 0) & (column < z.shape[1]), column.clamp(0, z.shape[1] - 1)


def room(scratch: Tensor | None, z: Tensor) -> Tensor | None:
    """As much of a buffer that may not be needed as z takes."""
    return None if scratch is None else scratch[: z.numel()].view(z.shape)


@dataclass(frozen=True)
class Slopes:
    """dloss/dproduct of a token and column, from per-token numbers `[T]`, all but the soft-cap's slope folded in.

    With p = e^{z−m} / s: dz = g·(1[target] − p) − g_H·p·(log p + H), and log p + H = z − m − e/s.
    A token without a distribution (all logits −inf) has none.
    """

    top: Tensor
    at_target: Tensor  # g
    of_p: Tensor  # −g / s, to be multiplied by e^{z−m}
    of_plogp: Tensor | None  # −g_H / s; None without an entropy's gradient
    centre: Tensor  # e / s

    @classmethod
    def of(cls, state: Tensor, slope: float, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Slopes:
        """`state [T, 4]` and the gradients `[T]` of the tokens that have a target; `slope`: the head's."""
        top, total, numerator, _ = state.unbind(1)
        dead = total == 0
        total = total.masked_fill(dead, 1.0)
        g = torch.zeros_like(top) if grad_logprobs is None else grad_logprobs.mul(slope).masked_fill(dead, 0.0)
        of_plogp = None if grad_entropy is None else -grad_entropy.mul(slope).masked_fill(dead, 0.0) / total
        return cls(finite(top), g, -g / total, of_plogp, numerator / total)

    def logit_gradient(self, z: Tensor, column: Tensor, scratch: Tensor | None) -> Tensor:
        """`[T, C]`, in the place of z. `scratch` (of z's shape) is needed for the entropy's gradient only, and not by
        the compiled library."""
        if native.serves(z):
            tensors = column, self.top, self.at_target, self.of_p, self.of_plogp, self.centre
            compact = [None if t is None else t.contiguous() for t in tensors]
            given = z.shape[1], *map(native.pointer, (z, *compact))
            native.spread("logit_gradients", "ippppppp", len(z), z.numel(), *given)
            return z
        z.sub_(self.top[:, None])
        if self.of_plogp is None:
            dz = z.exp_().mul_(self.of_p[:, None])
        else:
            p = torch.exp(z.clamp_(min=FLOOR), out=scratch)
            dz = z.sub_(self.centre[:, None]).mul_(self.of_plogp[:, None]).add_(self.of_p[:, None]).mul_(p)
        return add_at_target(dz, column, self.at_target)


def add_at_target(dz: Tensor, column: Tensor, values: Tensor) -> Tensor:
    """Adds each token's value where its target's column lies in this chunk, in place."""
    hit, column = hits(column, dz)
    # One entry per token: no two additions meet, so the order of the threads cannot show.
    return dz.scatter_add_(1, column[:, None], torch.where(hit, values, 0.0)[:, None])


class GradientSums:
    """dX, dW and db of one head, as its chunks come; None where not wanted."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: tuple[bool, bool, bool],
        total: WeightSum | None = None,
    ):
        self._x, self._total = x, total
        self.dx = torch.zeros_like(x) if wanted[0] else None
        self.dweight = torch.empty_like(weight) if wanted[1] else None
        self.dbias = torch.empty_like(bias) if wanted[2] and bias is not None else None

    def add(self, span: slice, rows: Tensor, dz: Tensor) -> None:
        """`rows [C, H]` of the weight, `dz [T, C]`."""
        if self.dx is not None:
            self.dx.addmm_(dz, rows)
        if self.dweight is not None:
            product_into(self.dweight[span], dz.T, self._x)
        if self._total is not None:
            self._total.add_product(span.start, dz, self._x)
        if self.dbias is not None:
            self.dbias[span] = dz.sum(dim=0)


def product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out ← left·right with one rounding: one product over all tokens, no sum in a narrower dtype."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)
