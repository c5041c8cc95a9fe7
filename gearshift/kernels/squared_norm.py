"""The sum of squares of many numbers, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from gearshift.kernels import native

_SMALL = 1e-30  # a square that fp32 holds to all its bits
BLOCK = 1 << 16  # numbers of one sum, whatever the number of threads


def squared_norm(x: Tensor) -> Tensor:
    """Σ x², fp64, exact to 1e-6 of it. x: flat, of any type.

    On processors squares of fp32 are added up in fp32 a few thousand at a time; where they are too large or too small
    for it, and elsewhere, in fp64 from the start.
    """
    if x.device.type == "cpu" and native.serves(x) and x.is_contiguous():
        blocks = -(-x.numel() // BLOCK)
        sums = torch.empty(blocks, dtype=torch.float64)
        given = x.numel(), BLOCK, native.pointer(x), native.pointer(sums)
        native.spread("squares", "iipp", blocks, x.numel(), *given)
        total = sums.sum()
        if total.isfinite() and total > x.numel() * _SMALL:
            return total
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()
