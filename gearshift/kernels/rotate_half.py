"""Rotary embedding of one position a row (Su et al. 2021, arXiv 2104.09864, in the layout of halves).

Letters: n rows, h heads, D size of a head.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from gearshift.kernels import native


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """`out` = x · cos + (−second half, first half of x) · sin, the bits of `plain`: x and out `[n, h, D]` fp32, cos and
    sin `[n, D]`, on a processor, whose D values lie side by side. The library must be there."""
    strides = (*x.stride()[:2], cos.stride(0), sin.stride(0), *out.stride()[:2])
    assert all(tensor.stride(-1) == 1 for tensor in (x, cos, sin, out))
    pointers = map(native.pointer, (x, cos, sin, out))
    turn = native.function("rotate_half", "iiippppp")
    native.run("rotate_half", functools.partial(turn, *x.shape, *pointers, (ctypes.c_int64 * 6)(*strides)))


def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same by operations of torch, as `transformers` writes it."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]
