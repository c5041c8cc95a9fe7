"""SwiGLU (Shazeer 2020, arXiv 2002.05202), between its products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gearshift.kernels import native

BLOCK = 4096  # numbers that one thread takes at once: native/swiglu.c


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) · up`, element by element, of tensors of one shape. Differentiable; the backward pass keeps these
    alone."""
    if not native.serves(gate, up) or gate.shape != up.shape:
        return plain(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        found: Tensor = _SwiGlu.apply(gate, up)
        return found
    return _forward(gate.contiguous(), up.contiguous())


def plain(gate: Tensor, up: Tensor) -> Tensor:
    """The same by operations of torch."""
    return torch.nn.functional.silu(gate) * up


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        results = torch.empty_like(gate), torch.empty_like(up)
        _spread("swiglu_backward", gate, up, gradients[0].contiguous(), *results)
        return results


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    _spread("swiglu", gate, up, out)
    return out


def _spread(name: str, *tensors: Tensor) -> None:
    numbers = tensors[0].numel()
    if not tensors[0].is_meta:
        pointers = map(native.pointer, tensors)
        native.spread(name, "i" + "p" * len(tensors), -(-numbers // BLOCK), numbers, numbers, *pointers)
