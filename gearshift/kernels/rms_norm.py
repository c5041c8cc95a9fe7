"""Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467). Letters: F features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gearshift.kernels import native

PART = 64  # rows whose share of the weight's gradient is one sum, whatever the number of threads


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, rounds: bool = False) -> Tensor:
    """`x / sqrt(mean(x²) + eps) · (weight + offset)` over the last dimension: x `[..., F]`, weight `[F]` -> `[..., F]`,
    in fp32 whatever the type of x, which the result has. Differentiable; the backward pass keeps the inputs alone.

    rounds: the quotient is rounded to x's type before it is scaled, as Llama's is.
    """
    with_gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if x.is_cuda and weight.is_contiguous() and not with_gradients:
        from gearshift.kernels.rms_norm_triton import norm

        return norm(x, weight, eps, offset, rounds)
    if not native.serves(x, weight) or not weight.is_contiguous():
        return plain(x, weight, eps, offset, rounds)
    found: Tensor = _RmsNorm.apply(x, weight, eps, offset) if with_gradients else _forward(x, weight, eps, offset)
    return found


def plain(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, rounds: bool = False) -> Tensor:
    """The same by operations of torch."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if rounds:
        normed = normed.to(x.dtype).float()
    return (normed * (weight.float() + offset)).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    """Saves the parameter itself, which ZeRO-3 gathers again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.numbers = eps, offset
        return _forward(x, weight, eps, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return *_backward(x, weight, gradients[0], *ctx.numbers, *ctx.needs_input_grad[:2]), None, None


def _forward(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    x = x.contiguous()
    out, features = torch.empty_like(x), x.shape[-1]
    if not x.is_meta:
        given = features, *map(native.pointer, (x, weight)), eps, offset, native.pointer(out)
        native.spread("rms_norm", "ippddp", x.numel() // max(1, features), x.numel(), *given)
    return out


def _backward(
    x: Tensor, weight: Tensor, gradient: Tensor, eps: float, offset: float, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the weight, each if it is asked for."""
    gradient, features = gradient.contiguous(), x.shape[-1]
    rows = x.numel() // max(1, features)
    parts = -(-rows // PART)
    dx = torch.empty_like(x) if of_x else None
    sums = x.new_empty(parts, features) if of_weight else None
    if not x.is_meta:
        pointers, results = map(native.pointer, (x, weight, gradient)), map(native.pointer, (dx, sums))
        given = rows, PART, features, *pointers, eps, offset, *results
        native.spread("rms_norm_backward", "iiipppddpp", parts, x.numel(), *given)
        if sums is not None:
            native.function("sum_rows", "iip")(parts, features, native.pointer(sums))
    if sums is None or parts == 1:
        return dx, None if sums is None else sums[0]
    return dx, sums[0].clone() if parts else x.new_zeros(features)
