"""`Head` for the Triton kernels: what happens to hidden·weight before the softmax, and its slope."""

# What Triton compiles is no Python with types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gearshift.kernels.head import Head


def head_numbers(head: Head) -> tuple[float, float, float]:
    """scale, softcap (1 where there is none) and 1 / temperature."""
    return head.scale, head.softcap or 1.0, 1.0 / head.temperature


def pointer(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel takes a pointer even where its form reads nothing."""
    return stand_in if tensor is None else tensor


@triton.jit
def head_logits(product, bias, scale, softcap, inverse_temperature, SOFTCAP: tl.constexpr):
    """z of a product."""
    z = (product + bias) * scale
    if SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z * inverse_temperature


@triton.jit
def tanh(x):
    """Within 2 ulp: by its series near 0, where the quotient would cancel."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    e = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def slope_of_cap(z, softcap, temperature, SOFTCAP: tl.constexpr):
    """dz/dproduct beyond the constant part: 1 − tanh²."""
    if SOFTCAP:
        capped = z * temperature / softcap
        return 1.0 - capped * capped
    else:
        return 1.0


@triton.jit
def finite(top):
    """The maximum to subtract: 0 where all logits are −inf."""
    return tl.where(top == -float("inf"), 0.0, top)
