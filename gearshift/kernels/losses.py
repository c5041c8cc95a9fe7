"""What the two clipped losses share: their result, their inputs' form, and how a ready gradient is handed back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gearshift.kernels import checks


class Loss(NamedTuple):
    """`loss []`, differentiable; `metrics`: scalar fp64 sums without gradient, to be added over batches and ranks."""

    loss: Tensor
    metrics: dict[str, Tensor]


def log_ratio(logprobs: Tensor, other: Tensor) -> Tensor:
    """logprobs − other; 0 where both are −inf: a token that is impossible under both is equally likely under both."""
    both = (logprobs == -torch.inf) & (other == -torch.inf)
    return logprobs.masked_fill(both, 0.0) - other.masked_fill(both, 0.0)


def prepare(mask: Tensor, clip: float, **tensors: Tensor) -> list[Tensor]:
    """Checks the inputs and returns the tensors in the accumulation dtype with 0 where masked, so that no NaN leaks.

    The first tensor keeps its gradient; the others are constants of the loss.
    """
    checks.require_mask(mask)
    checks.require_float(**tensors)
    checks.require_shape(mask.shape, "the shape of mask", **tensors)
    checks.require(clip > 0, f"clip must be above 0, got {clip}")
    dtype = checks.accumulation_dtype(*tensors.values())
    first, *rest = (torch.where(mask, tensor.to(dtype), 0.0) for tensor in tensors.values())
    return [first, *(tensor.detach() for tensor in rest)]


def divisor(tokens: int | Tensor, mask: Tensor, like: Tensor) -> Tensor:
    """`tokens` as a scalar to divide by: a minibatch without any token has loss 0, not 0/0.

    A count of 0 beside unmasked tokens is a mistake, and stays visible as an infinite loss.
    """
    count = torch.as_tensor(tokens, dtype=like.dtype, device=like.device)
    checks.require(count.dim() == 0, f"tokens must be one number, got shape {list(count.shape)}")
    return torch.where(mask.any(), count, count.clamp(min=1.0))


def summed(values: Tensor) -> Tensor:
    """A metric: the sum in fp64, without gradient."""
    return values.detach().sum(dtype=torch.float64)


class ReadyGradient(torch.autograd.Function):
    """A scalar whose gradient was formed beside it: backward only scales it."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        """`value []` is the loss and `gradient` its derivative by `source`, of the same shape."""
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None
