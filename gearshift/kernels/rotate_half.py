"""Rotary embedding (Su et al. 2021, arXiv 2104.09864, in the layout of halves) on processors.

Letters: n rows, S positions, h heads, D size of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gearshift.kernels import native


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x · cos + (−second half, first half of x) · sin of queries and keys, the bits of `plain`, differentiable in
    these: q `[n, h, S, D]`, k `[n, k, S, D]`, cos and sin `[n or 1, S, D]`, fp32. The heads of a position of the
    results lie side by side in memory. The library must be there."""
    found: tuple[Tensor, Tensor] = _Rotary.apply(q, k, cos, sin)
    return found


def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[n, h, D]` turned by cos and sin `[n, D]`, by operations of torch, as `transformers` writes it."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turned(q, cos, sin), _turned(k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *(_turned(gradient, cos, sin, back=True) for gradient in gradients), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    rows, heads, positions, size = x.shape
    out = x.new_empty(rows, positions, heads, size).transpose(1, 2)
    if not x.is_meta:
        x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
        _turn(x, cos.expand(rows, -1, -1), sin.expand(rows, -1, -1), out, back)
    return out


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, back: bool = False) -> None:
    """x and out `[n, h, S, D]`, cos and sin `[n, S, D]`. back: from the gradient of a result to its input's."""
    assert all(tensor.stride(-1) == 1 for tensor in (x, cos, sin, out))
    rows, heads, positions, size = x.shape
    strides = (*_strides(x), *cos.stride()[:2], *sin.stride()[:2], *_strides(out))
    given = back, positions, heads, size, *map(native.pointer, (x, cos, sin, out)), *strides
    native.spread("rotate_half", "iiiipppp" + "i" * len(strides), rows * positions, x.numel(), *given)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of rows, positions and heads."""
    rows, heads, positions, _ = x.stride()
    return rows, positions, heads
