"""PPO's clipped policy loss (Schulman et al. 2017, arXiv 1707.06347, equation 7), with the optional dual clip of
Ye et al. 2020 (arXiv 1912.09729, equation 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from gearshift.kernels import checks
from gearshift.kernels.losses import Loss, ReadyGradient, divisor, log_ratio, prepare, summed


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
    _check_dual_clip(dual_clip)
    new, old, adv = prepare(mask, clip, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    with torch.no_grad():
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
        count = divisor(tokens, mask, objective)
        # d(r·A)/d logprob = r·A; where the clip holds, the term is a constant.
        gradient = torch.where(clipped, 0.0, -free / count)
        metrics = {
            "tokens": summed(mask),
            "clipped": summed(clipped & mask),
            "approx_kl": summed(torch.where(mask, torch.expm1(log_r) - log_r, 0.0)),
            "ratio": summed(torch.where(mask, ratio, 0.0)),
        }
        value = -objective.sum() / count
    return Loss(ReadyGradient.apply(new, value, gradient), metrics)


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
    _check_dual_clip(dual_clip)
    new, old, adv = prepare(mask, clip, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    ratio = torch.exp(new - old)
    objective = torch.minimum(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)
    if dual_clip is not None:
        objective = torch.where(adv < 0, torch.maximum(objective, dual_clip * adv), objective)
    return -torch.where(mask, objective, 0.0).sum() / divisor(tokens, mask, objective)


def _check_dual_clip(dual_clip: float | None) -> None:
    checks.require(dual_clip is None or dual_clip > 1, f"dual_clip must be above 1, got {dual_clip}")
