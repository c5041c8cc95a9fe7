"""PPO's clipped policy loss (Schulman et al. 2017, arXiv 1707.06347, equation 7), with the optional dual clip of
Ye et al. 2020 (arXiv 1912.09729, equation 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gearshift.kernels import checks
from gearshift.kernels.losses import (
    Formed,
    Loss,
    check,
    divisor,
    fake,
    log_ratio,
    masked,
    save_gradient,
    scale_gradient,
    split_count,
    summed,
)

METRICS = ("tokens", "clipped", "approx_kl", "ratio")


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    dual_clip: float | None = None,
    tokens: int | Tensor,
) -> Loss:
    """−Σ min(r·A, clip(r, 1−clip, 1+clip)·A) / tokens, r = exp(logprobs − old_logprobs); differentiable in `logprobs`.

    `logprobs`, `old_logprobs`, `advantages`: `[B, L]` bf16, fp16 or fp32; `mask [B, L]` bool. Masked entries may hold
    anything. `tokens`: the minibatch's response tokens over all ranks and micro-batches, to divide by. With
    `dual_clip` c > 1, the objective for A < 0 is never below c·A.

    Metrics: `tokens`; `clipped` (tokens whose gradient was clipped away); `approx_kl`, Σ (r − 1 − log r), an estimate
    of KL(old‖new); `ratio`, Σ r. Raises ValueError for shapes, dtypes and settings that cannot be.
    """
    checks.require_above(1, dual_clip=dual_clip)
    check(mask, clip, tokens, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    loss, metrics, _ = torch.ops.gearshift.policy_loss(
        logprobs, old_logprobs, advantages, mask, clip, dual_clip, *split_count(tokens, mask)
    )
    return Loss(loss, dict(zip(METRICS, metrics.unbind(), strict=True)))


def implementation(mask: Tensor) -> Callable[..., Formed]:
    """The function that serves this device."""
    if mask.is_cuda:
        from gearshift.kernels import losses_triton

        return losses_triton.policy_loss
    return vectorized


def vectorized(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float, dual_clip: float | None,
    tokens: Tensor | None, count: int,
) -> Formed:  # fmt: skip
    """By operations on whole tensors; `tokens`, or `count` where that is None, to divide by. fp64 stays fp64."""
    new, old, adv = masked(mask, logprobs, old_logprobs, advantages)
    log_r = log_ratio(new, old)
    ratio = log_r.exp()
    # An infinite ratio meets A = 0 in masked or constant batches: the term is 0 there, not inf·0.
    free = torch.where(adv == 0, 0.0, ratio * adv)
    bound = ratio.clamp(1 - clip, 1 + clip) * adv
    clipped = bound < free
    objective = torch.minimum(free, bound)
    if dual_clip is not None:
        floor = torch.where(adv < 0, dual_clip * adv, -torch.inf)
        clipped |= floor > objective
        objective = torch.maximum(objective, floor)
    by = divisor(count if tokens is None else tokens, mask, objective)
    # d(r·A)/d logprob = r·A; where the clip holds, the term is a constant.
    gradient = torch.where(clipped, 0.0, -free / by)
    metrics = summed(
        mask,
        clipped & mask,
        torch.where(mask, torch.expm1(log_r) - log_r, 0.0),
        torch.where(mask, ratio, 0.0),
    )
    return Formed(-objective.sum() / by, metrics, gradient)


def plain(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    dual_clip: float | None = None,
    tokens: int | Tensor,
) -> Tensor:
    """What `policy_loss(...).loss` means, by autograd."""
    checks.require_above(1, dual_clip=dual_clip)
    check(mask, clip, tokens, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    new, old, adv = masked(mask, logprobs, old_logprobs, advantages)
    ratio = torch.exp(new - old)
    objective = torch.minimum(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)
    if dual_clip is not None:
        objective = torch.where(adv < 0, torch.maximum(objective, dual_clip * adv), objective)
    return -torch.where(mask, objective, 0.0).sum() / divisor(tokens, mask, objective)


# --- operator of torch.library: torch.compile and fake tensors pass through ------------------------------------------


@torch.library.custom_op(
    "gearshift::policy_loss",
    mutates_args=(),
    schema="(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, float clip, float? dual_clip, "
    "Tensor? tokens, SymInt count) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float, dual_clip: float | None,
    tokens: Tensor | None, count: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, metrics in the order of METRICS, and the gradient."""
    formed = implementation(mask)(logprobs, old_logprobs, advantages, mask, clip, dual_clip, tokens, count)
    return formed.loss, formed.metrics, formed.gradient.contiguous()


@_forward.register_fake
def _(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return fake(len(METRICS), mask, logprobs, old_logprobs, advantages)


_forward.register_autograd(scale_gradient, setup_context=save_gradient)
