"""Modules of a model that do several operations on whole tensors, in one pass over memory each.

What a module computes is tried on random numbers, in a copy that has weights of its own: those of the model may be cut
over the ranks, or have no memory at all.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.engine.rotary import bind_rotary_of_sequences
from gearshift.kernels import native, rms_norm, swiglu

_CPU = torch.device("cpu")


def bind_fused(model: Any, device: torch.device) -> None:
    """RMS norms, SwiGLU and rotary embeddings of a model that computes on `device`, in both passes. Only fp32 on a
    processor has such kernels; any other model stays as it is."""
    if device.type != "cpu" or native.built() is None or next(model.parameters()).dtype != torch.float32:
        return
    for module in model.modules():
        bind_norm(module)
        bind_swiglu(module)
    bind_rotary_of_sequences(model)


# --- norms -----------------------------------------------------------------------------------------------------------

# What is added to the weight, and whether the quotient is rounded first: the ways of the families.
_NORMS = ((0.0, True), (0.0, False), (1.0, False))


@torch.no_grad()
def bind_norm(module: Any, norm: Callable[..., Tensor] = rms_norm) -> None:
    """An RMS norm in one pass over its rows, by `norm`, which computes what `rms_norm` does; any other module, and a
    norm that computes something else, stays as it is.

    Some families multiply by the weight, some by 1 more, some round what they multiply. On a processor only fp32 has
    such a pass.
    """
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or not isinstance(eps, float) or not _is_small(module, weight):
        return
    draw, device = torch.Generator().manual_seed(0), _CPU if weight.is_meta else weight.device
    features = _shape(weight)[0]
    x, drawn = (torch.randn(*shape, features, generator=draw).to(device, weight.dtype) for shape in ((2, 3), ()))
    stand_in = _with(module, _parameters=module._parameters | {"weight": nn.Parameter(drawn)})
    try:
        own = type(module).forward(stand_in, x)
        fits = [how for how in _NORMS if _are_close(own, rms_norm(x, drawn, eps, *how))]
    except (RuntimeError, TypeError):  # it takes something else than one tensor
        fits = []
    if not fits:
        return

    def forward(self: Any, x: Tensor) -> Tensor:
        return norm(x, self.weight, eps, *fits[0])

    module.forward = types.MethodType(forward, module)


def _are_close(own: Tensor, other: Tensor) -> bool:
    """To the last bits in fp32; else to the same bits but in one number of a hundred, which is off by a rounding."""
    if own.dtype != other.dtype or own.shape != other.shape:
        return False
    if own.dtype == torch.float32:
        return torch.allclose(own, other, atol=1e-5)
    close = torch.allclose(own.float(), other.float(), rtol=2 * torch.finfo(own.dtype).eps, atol=1e-6)
    return close and float((own != other).float().mean()) < 0.01


def _is_small(module: nn.Module, weight: Tensor) -> bool:
    """One vector, and nothing else in it, where there is a kernel for it."""
    return (
        (weight.is_cuda or (weight.device.type in ("cpu", "meta") and weight.dtype == torch.float32))
        and len(_shape(weight)) == 1
        and len(list(module.parameters())) == 1
        and not list(module.children())
        and _takes_one(module)
    )


# --- feed-forward ----------------------------------------------------------------------------------------------------

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@torch.no_grad()
def bind_swiglu(module: Any) -> None:
    """`down_proj(silu(gate_proj(x)) · up_proj(x))` with what is between the products in one pass; any other module
    stays as it is. The projections are called as modules, whatever they are: ZeRO-3 then gathers their weights."""
    children = set(module._modules)
    if not children.issuperset(_PROJECTIONS) or children - {*_PROJECTIONS, "act_fn"} or not _takes_one(module):
        return
    draw = torch.Generator().manual_seed(0)
    gate, up, down = (_linear(*sizes, draw) for sizes in ((6, 10), (6, 10), (10, 6)))
    stand_in = _with(module, _modules=module._modules | dict(zip(_PROJECTIONS, (gate, up, down), strict=True)))
    x = 10 * torch.randn(2, 3, 6, generator=draw)  # also where activations are flat, or are cut off
    try:
        own = type(module).forward(stand_in, x)
    except (RuntimeError, TypeError, AttributeError):  # it takes other sizes, or something else
        return
    if not isinstance(own, Tensor) or not torch.allclose(own, down(swiglu(gate(x), up(x))), rtol=1e-5, atol=1e-4):
        return

    def forward(self: Any, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return found

    module.forward = types.MethodType(forward, module)


def _linear(inputs: int, outputs: int, draw: torch.Generator) -> nn.Linear:
    """Of numbers of its own, for which nobody's random state moves."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False)
    layer.weight.copy_(torch.randn(outputs, inputs, generator=draw))
    return layer


# --- stand-ins -------------------------------------------------------------------------------------------------------


def _with(module: nn.Module, **own: Any) -> nn.Module:
    """The module with other parameters, or other modules inside."""
    other = copy.copy(module)
    vars(other).update(own)
    return other


def _shape(weight: Any) -> torch.Size:
    """Of the whole weight: what ZeRO-3 has cut is empty."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape


def _takes_one(module: nn.Module) -> bool:
    """Its forward is its class's, of one argument."""
    return "forward" not in vars(module) and len(inspect.signature(type(module).forward).parameters) == 2
