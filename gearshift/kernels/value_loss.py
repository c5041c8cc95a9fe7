"""The clipped value loss of PPO2, as in lm-human-preferences (and "The N+ implementation details", 2403.17031)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gearshift.kernels.losses import (
    Formed,
    Loss,
    check,
    divisor,
    fake,
    masked,
    save_gradient,
    scale_gradient,
    split_count,
    summed,
)

METRICS = ("tokens", "clipped", "returns", "returns_sq", "error", "error_sq")


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    tokens: int | Tensor,
) -> Loss:
    """½ Σ max((v − R)², (v_old + clip(v − v_old, ±clip) − R)²) / tokens; differentiable in `values`.

    `values`, `old_values`, `returns`: `[B, L]` bf16, fp16 or fp32; `mask [B, L]` bool. Masked entries may hold
    anything. `tokens`: the minibatch's response tokens over all ranks and micro-batches, to divide by.

    Metrics: `tokens`; `clipped` (tokens whose gradient was clipped away); the terms of the explained variance
    1 − Var(R − v) / Var(R): `returns`, `returns_sq`, `error` (R − v), `error_sq`, as sums.
    Raises ValueError for shapes, dtypes and settings that cannot be.
    """
    check(mask, clip, tokens, values=values, old_values=old_values, returns=returns)
    loss, metrics, _ = torch.ops.gearshift.value_loss(
        values, old_values, returns, mask, clip, *split_count(tokens, mask)
    )
    return Loss(loss, dict(zip(METRICS, metrics.unbind(), strict=True)))


def implementation(mask: Tensor) -> Callable[..., Formed]:
    """The function that serves this device."""
    if mask.is_cuda:
        from gearshift.kernels import losses_triton

        return losses_triton.value_loss
    return vectorized


def vectorized(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float, tokens: Tensor | None, count: int
) -> Formed:
    """By operations on whole tensors; `tokens`, or `count` where that is None, to divide by. fp64 stays fp64."""
    new, old, target = masked(mask, values, old_values, returns)
    error = target - new
    free = error.square()
    # clamp() leaves v itself inside the band; v_old + (v − v_old) would differ by a rounding and count as clipped.
    bound = (target - torch.clamp(new, old - clip, old + clip)).square()
    clipped = bound > free
    by = divisor(count if tokens is None else tokens, mask, error)
    gradient = torch.where(clipped, 0.0, -error / by)
    metrics = summed(mask, clipped, target, target.double().square(), error, error.double().square())
    return Formed(0.5 * torch.maximum(free, bound).sum() / by, metrics, gradient)


def plain(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    tokens: int | Tensor,
) -> Tensor:
    """What `value_loss(...).loss` means, by autograd."""
    check(mask, clip, tokens, values=values, old_values=old_values, returns=returns)
    new, old, target = masked(mask, values, old_values, returns)
    near = old + torch.clamp(new - old, -clip, clip)
    worse = torch.maximum((new - target).square(), (near - target).square())
    return 0.5 * torch.where(mask, worse, 0.0).sum() / divisor(tokens, mask, worse)


# --- operator of torch.library: torch.compile and fake tensors pass through ------------------------------------------


@torch.library.custom_op(
    "gearshift::value_loss",
    mutates_args=(),
    schema="(Tensor values, Tensor old_values, Tensor returns, Tensor mask, float clip, Tensor? tokens, SymInt count) "
    "-> (Tensor, Tensor, Tensor)",
)
def _forward(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float, tokens: Tensor | None, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, metrics in the order of METRICS, and the gradient."""
    formed = implementation(mask)(values, old_values, returns, mask, clip, tokens, count)
    return formed.loss, formed.metrics, formed.gradient.contiguous()


@_forward.register_fake
def _(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fake(len(METRICS), mask, values, old_values, returns)


_forward.register_autograd(scale_gradient, setup_context=save_gradient)
