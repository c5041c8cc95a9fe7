"""Linear layers that keep no weight for the backward pass.

torch saves the transposed weight, a view: when ZeRO-3 lets go of a layer's gathered weight, that view keeps its memory,
and by the end of a forward pass every rank would hold the whole model. Here the parameter itself is saved, which
ZeRO-3 gathers again when the backward pass comes to it. DeepSpeed's `memory_efficient_linear` does the same, but by
replacing `torch.nn.functional.linear` for the whole process and for good, rollouts and frozen models included.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class _Linear(torch.autograd.Function):
    """`x W^T + b`: x `[..., I]`, W `[O, I]`, b `[O]` or None. The same products as torch's own, in both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        dx = None if weight is None else (rows @ weight).view(*gradient.shape[:-1], weight.shape[1])
        dweight = None if x is None else rows.t() @ x.reshape(-1, x.shape[-1])
        return dx, dweight, rows.sum(0) if ctx.needs_input_grad[2] else None


def bind_linears(module: nn.Module) -> None:
    """For every plain linear layer inside that has no forward of its own."""
    for layer in module.modules():
        if type(layer).forward is nn.Linear.forward and "forward" not in vars(layer):
            layer.forward = types.MethodType(_forward, layer)


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    found: Tensor = _Linear.apply(x, self.weight, self.bias)
    return found
