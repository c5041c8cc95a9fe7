"""Linear layers of one input, computed together.

A model calls its projections of queries, keys and values, and those of a gate and what it opens, one after the other
with the same tensor. Whichever is called first computes all of them here: with one sum of the input's gradient, which
each product joins, and queries, keys and values as one product where their weights lie side by side. Letters: I inputs,
O outputs.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gearshift.engine.linears import is_bound, weight_gradient
from gearshift.engine.sharded import has_own_memory, lay_together

# Their names, and whether results may be parts of wider rows: heads are read row by row, while SwiGLU would copy them.
GROUPS = ((("q_proj", "k_proj", "v_proj"), True), (("gate_proj", "up_proj"), False))


def bind_siblings(model: nn.Module) -> None:
    """For every such group of a model whose weights are all there when one of its layers is called (`engine.whole`)."""
    for module in model.modules():
        for names, joins in GROUPS:
            layers = [module._modules.get(name) for name in names]
            if all(isinstance(layer, nn.Module) and _is_plain(layer) for layer in layers):
                _Siblings([layer for layer in layers if isinstance(layer, nn.Linear)], joins)


def _is_plain(layer: nn.Module) -> bool:
    """Its class's own product, or that of `engine.linears`, and nothing else."""
    own = "forward" not in vars(layer) or is_bound(layer)
    return (
        type(layer) is nn.Linear
        and layer.bias is None
        and own
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    )


class _Siblings:
    """What the layers still have to give for the input of whichever came first."""

    def __init__(self, layers: list[nn.Linear], joins: bool):
        self._layers, self._joins = layers, joins
        self._input: Tensor | None = None
        self._ready: dict[int, Tensor] = {}
        self._agree = True  # so far each input was given to all of them
        weights = [layer.weight for layer in layers]
        # Those that are there already would stay where they are.
        if joins and not any(w.numel() for w in weights) and all(map(has_own_memory, weights)):
            lay_together(weights)
        for number, layer in enumerate(layers):
            layer.forward = types.MethodType(self._forward_of(number, layer.forward), layer)  # type: ignore[method-assign]

    def _forward_of(self, number: int, asked: Callable[[Tensor], Tensor]) -> Callable[[nn.Linear, Tensor], Tensor]:
        def forward(_: nn.Linear, x: Tensor) -> Tensor:
            if self._input is not x and not self._begin(x):
                return asked(x)
            ready = self._ready.pop(number, None)
            if ready is None:  # one layer a second time
                return asked(x)
            if not self._ready:
                self._input = None
            return ready

        return forward

    def _begin(self, x: Tensor) -> bool:
        """Whether all are computed for x."""
        if self._ready:  # somebody was not asked for the last one
            self._agree, self._input = False, None
            self._ready.clear()
        if not self._agree:
            return False
        weights = [layer.weight for layer in self._layers]
        self._input, self._ready = x, dict(enumerate(_Together.apply(x, self._joins, *weights)))
        return True


class _Together(torch.autograd.Function):
    """x `[..., I]` and weights `[O, I]` -> `[..., O]` of each; `joins`: as parts of one product. Saves the parameters
    themselves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, joins: bool, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x if any(ctx.needs_input_grad[2:]) else None, *weights)
        joined = _side_by_side(weights) if joins else None
        if joined is None:
            return tuple(linear(x, weight) for weight in weights)
        return linear(x, joined).split([len(weight) for weight in weights], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        rows = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = rows[0] @ weights[0]
            for gradient, weight in zip(rows[1:], weights[1:], strict=True):
                dx.addmm_(gradient, weight)
            dx = dx.view(*gradients[0].shape[:-1], -1)
        wanted = ctx.needs_input_grad[2:]
        found = (
            weight_gradient(weight, gradient, x.reshape(-1, x.shape[-1])) if asked else None
            for weight, gradient, asked in zip(weights, rows, wanted, strict=True)
        )
        return dx, None, *found


def _side_by_side(weights: tuple[Tensor, ...]) -> Tensor | None:
    """The weights as one `[sum of O, I]`, where one follows the other in memory."""
    first = weights[0]
    end = first.data_ptr()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or weight.data_ptr() != end or not weight.is_contiguous() or weight.shape[1:] != first.shape[1:]:
            return None
        end += weight.nbytes
    return first.as_strided((sum(map(len, weights)), first.shape[1]), (first.shape[1], 1))
