"""The clipped value loss of PPO2, as in lm-human-preferences (and "The N+ implementation details", 2403.17031)."""

from __future__ import annotations

import torch
from torch import Tensor

from gearshift.kernels.losses import Loss, ReadyGradient, divisor, prepare, summed


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
    new, old, target = prepare(mask, clip, values=values, old_values=old_values, returns=returns)
    with torch.no_grad():
        error = target - new
        free = error.square()
        # clamp() leaves v itself inside the band; v_old + (v − v_old) would differ by a rounding and count as clipped.
        bound = (target - torch.clamp(new, old - clip, old + clip)).square()
        clipped = bound > free
        count = divisor(tokens, mask, error)
        gradient = torch.where(clipped, 0.0, -error / count)
        metrics = {
            "tokens": summed(mask),
            "clipped": summed(clipped),
            "returns": summed(target),
            "returns_sq": summed(target.double().square()),
            "error": summed(error),
            "error_sq": summed(error.double().square()),
        }
        value = 0.5 * torch.maximum(free, bound).sum() / count
    return Loss(ReadyGradient.apply(new, value, gradient), metrics)


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
    new, old, target = prepare(mask, clip, values=values, old_values=old_values, returns=returns)
    near = old + torch.clamp(new - old, -clip, clip)
    worse = torch.maximum((new - target).square(), (near - target).square())
    return 0.5 * torch.where(mask, worse, 0.0).sum() / divisor(tokens, mask, worse)
