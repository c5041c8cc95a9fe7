"""What a rank's share of a layer is, beside linear layers and embeddings: experts, norms that span heads, counts.

Letters: t ranks of the group.
"""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from gearshift.engine.layout import TensorParallelLayout, whole_heads
from gearshift.engine.tensor_parallel import TensorParallelGroup
from gearshift.errors import UserError
from gearshift.kernels import decode_step

# What an attention module keeps of its heads, or of their features; a rank's module counts the heads that it has.
_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "split_size")


def bind_shares(model: Any, layout: TensorParallelLayout, group: TensorParallelGroup) -> None:
    """Make the modules that the layout names compute with this rank's slices, which their parameters already are."""
    for name, module in model.named_modules():
        role = layout.roles.get(name)
        if role == "sum":
            _bind_sum(module, group)
        elif role == "share":
            _bind_share(module, group.size)
        elif role == "mean_square":
            _bind_norm(module, group)
        elif role == "head_norms":
            low, high = whole_heads(len(module.norms), group.size, 1, name)[group.rank]
            module.norms = nn.ModuleList(list(module.norms)[low:high])
        elif any(layout.roles.get(f"{name}.{child}") == "column" for child, _ in module.named_children()):
            _count_own_heads(module, group.size)
    for name, role in layout.roles.items():
        if role == "first" and group.rank > 0:
            owner, _, own = name.rpartition(".")
            _zero(model.get_submodule(owner), own)


def _bind_sum(module: nn.Module, group: TensorParallelGroup) -> None:
    own_forward = module.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return group.all_reduce(own_forward(*args, **kwargs))

    module.forward = types.MethodType(forward, module)


def _bind_share(module: nn.Module, tp_size: int) -> None:
    own_forward = module.forward

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = own_forward(x)
        return y / tp_size

    module.forward = types.MethodType(forward, module)


def _bind_norm(module: Any, group: TensorParallelGroup) -> None:
    """An RMS norm over the features of all ranks. Each has as many, so the mean over all is the mean of the means
    (also where a head is repeated, since then every head is)."""
    if not hasattr(module, "variance_epsilon") or getattr(module, "bias", None) is not None:
        raise UserError(f"{type(module).__name__}: only an RMS norm can span the heads of several ranks")

    def forward(self: Any, x: Tensor) -> Tensor:
        wide = x.float()
        mean_square = group.all_reduce(wide.square().mean(-1, keepdim=True)) / group.size
        normed: Tensor = self.weight * (wide * torch.rsqrt(mean_square + self.variance_epsilon))
        return normed.to(x.dtype)

    module.forward = types.MethodType(forward, module)


def bind_silu(module: Any) -> None:
    """The activation of most families as a task, where a step of decoding on a processor asks for it."""
    if type(module) in (nn.SiLU, SiLUActivation):
        module.forward = decode_step.silu


def _count_own_heads(module: Any, tp_size: int) -> None:
    """Some models cut what a projection gives by counts of the whole model, kept in the module or in its config."""
    if not hasattr(module, "head_dim"):
        return
    for name in _COUNTS:
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, max(1, getattr(module, name) // tp_size))
    if hasattr(module, "config"):
        module.config = copy.copy(module.config)
        module.config.num_attention_heads //= tp_size


def _zero(module: nn.Module, name: str) -> None:
    """The module reads zeros where another rank adds the true value; the slice itself is still shifted into."""
    own = module._parameters[name]
    assert own is not None
    module._parameters[name] = nn.Parameter(torch.zeros_like(own), requires_grad=False)
