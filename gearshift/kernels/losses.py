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


class Formed(NamedTuple):
    """What an operator forms in its forward: `loss []` and `gradient`, its derivative by the operator's first input,
    in the accumulation dtype; `metrics`: a vector in fp64."""

    loss: Tensor
    metrics: Tensor
    gradient: Tensor


def log_ratio(logprobs: Tensor, other: Tensor) -> Tensor:
    """logprobs − other; 0 where both are −inf: a token that is impossible under both is equally likely under both."""
    both = (logprobs == -torch.inf) & (other == -torch.inf)
    return logprobs.masked_fill(both, 0.0) - other.masked_fill(both, 0.0)


def check(mask: Tensor, clip: float, tokens: int | Tensor, **tensors: Tensor) -> None:
    checks.require_mask(mask)
    checks.require_float(**tensors)
    checks.require_shape(mask.shape, "the shape of mask", **tensors)
    checks.require_device(mask, "mask", **tensors)
    checks.require_above(0, clip=clip)
    if isinstance(tokens, Tensor) and tokens.dim():
        raise ValueError(f"tokens must be one number, got shape {list(tokens.shape)}")


def masked(mask: Tensor, first: Tensor, *others: Tensor) -> list[Tensor]:
    """The tensors in the accumulation dtype with 0 where masked, so that no NaN leaks.

    The first tensor keeps its gradient; the others are constants of the loss.
    """
    dtype = checks.accumulation_dtype(first, *others)
    first, *rest = (torch.where(mask, tensor.to(dtype), 0.0) for tensor in (first, *others))
    return [first, *(tensor.detach() for tensor in rest)]


def divisor(tokens: int | Tensor, mask: Tensor, like: Tensor) -> Tensor:
    """`tokens` as a scalar to divide by: a minibatch without any token has loss 0, not 0/0.

    A count of 0 beside unmasked tokens is a mistake, and stays visible as an infinite loss.
    """
    count = torch.as_tensor(tokens, dtype=like.dtype, device=like.device)
    return torch.where(mask.any(), count, count.clamp(min=1.0))


def summed(*values: Tensor) -> Tensor:
    """Metrics: each tensor's sum, in fp64."""
    return torch.stack([value.sum(dtype=torch.float64) for value in values])


# --- operators of torch.library: what those of the two losses share --------------------------------------------------


def split_count(tokens: int | Tensor, mask: Tensor) -> tuple[Tensor | None, int]:
    """`tokens` as an operator takes it: a tensor, which the host never reads, or a number, which needs no copy."""
    return (tokens.to(mask.device), 0) if isinstance(tokens, Tensor) else (None, tokens)


def fake(metrics: int, mask: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = checks.accumulation_dtype(*tensors)
    return (
        mask.new_empty((), dtype=dtype),
        mask.new_empty((metrics,), dtype=torch.float64),
        mask.new_empty(mask.shape, dtype=dtype),
    )


def save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, metrics, gradient = output
    ctx.save_for_backward(gradient)
    ctx.dtype, ctx.inputs = inputs[0].dtype, len(inputs)
    ctx.mark_non_differentiable(metrics, gradient)


def scale_gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (torch.ops.gearshift.loss_backward(gradient, grad, ctx.dtype), *(None,) * (ctx.inputs - 1))


@torch.library.custom_op(
    "gearshift::loss_backward", mutates_args=(), schema="(Tensor gradient, Tensor grad, ScalarType dtype) -> Tensor"
)
def _backward(gradient: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · grad, rounded once. An operator, so that a second derivative is an error and not 0."""
    return torch.mul(gradient, grad, out=torch.empty_like(gradient, dtype=dtype))


@_backward.register_fake
def _(gradient: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)
