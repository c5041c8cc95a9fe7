"""Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467). Letters: F features."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gearshift.kernels import native

WORTH_THREADS = 1 << 17  # numbers for which a second thread is worth waking


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, rounds: bool = False) -> Tensor:
    """`x / sqrt(mean(x²) + eps) · (weight + offset)` over the last dimension, without gradients: x `[..., F]`, weight
    `[F]` -> `[..., F]`, in fp32 whatever the type of x, which the result has.

    rounds: the quotient is rounded to x's type before it is scaled, as Llama's is.
    """
    if x.is_cuda and weight.is_contiguous():
        from gearshift.kernels.rms_norm_triton import norm

        return norm(x, weight, eps, offset, rounds)
    if not _serves(x, weight):
        return plain(x, weight, eps, offset, rounds)
    x = x.contiguous()
    out = torch.empty_like(x)
    rest = (x.shape[-1], *map(native.pointer, (x, weight)), eps, offset, native.pointer(out))
    native.run("rms_norm", functools.partial(_rows, x.numel() // max(1, x.shape[-1]), x.shape[-1], rest))
    return out


def plain(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, rounds: bool = False) -> Tensor:
    """The same by operations of torch."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if rounds:
        normed = normed.to(x.dtype).float()
    return (normed * (weight.float() + offset)).to(x.dtype)


def _rows(rows: int, features: int, rest: tuple[object, ...]) -> int:
    norm = native.function("rms_norm", "iiippddp")
    if rows * features < WORTH_THREADS:
        norm(0, rows, *rest)
    else:
        native.over_rows(lambda first, last: norm(first, last, *rest), rows)
    return 0


def _serves(x: Tensor, weight: Tensor) -> bool:
    return (
        native.built() is not None
        and weight.is_contiguous()
        and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (x, weight))
    )
