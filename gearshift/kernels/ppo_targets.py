"""From log-probs, values and scores to rewards, advantages and returns.

Rewards: InstructGPT (arXiv 2203.02155), section 3.5; KL estimators: Schulman, "Approximating KL divergence" (2020);
advantages: GAE (arXiv 1506.02438), equations 11 to 16. Letters: B sequences, L response length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.kernels import checks, ppo_targets_cpu
from gearshift.kernels.moments import WHITEN_EPSILON
from gearshift.kernels.ppo_targets_cpu import ESTIMATORS


class Targets(NamedTuple):
    """`[B, L]` each, fp32, 0 where masked, without gradient."""

    rewards: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def ppo_targets(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    scores: Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
    kl: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Targets:
    """Rewards −kl_coef·KL + score at the last token, GAE(gamma, lam), and returns from the advantages before whitening.

    `logprobs`, `ref_logprobs`, `values`, and `kl` if given (in place of the estimate): `[B, L]`; `mask [B, L]` bool,
    True on each row's first tokens (right-padded; a row may be empty); `scores [B]`. Masked entries may hold anything.
    The value past the last response token is 0. Whitening is over all tokens of all ranks of `group` (None: this
    process only); every rank of it must call, with or without rows.
    Raises ValueError for shapes, dtypes, devices and settings that cannot be, and for a mask that is not right-padded:
    on a GPU, where reading the mask back would cost every call a wait, such a row's advantages are NaN instead.
    """
    _check(logprobs, ref_logprobs, values, mask, scores, kl, estimator=estimator, gamma=gamma, lam=lam)
    name = None if group is None else group.group_name
    return Targets(
        *torch.ops.gearshift.ppo_targets(
            logprobs, ref_logprobs, values, mask, scores, kl, kl_coef, estimator, gamma, lam, whiten, name
        )
    )


def implementation(mask: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The function that serves this device."""
    if mask.is_cuda:
        from gearshift.kernels import ppo_targets_triton

        return ppo_targets_triton.ppo_targets
    return ppo_targets_cpu.ppo_targets


def plain(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    scores: Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
) -> Targets:
    """What `ppo_targets` means on one process: one sequence at a time, one token after the other, from the end."""
    rewards, kls, advantages, returns = (torch.zeros_like(values) for _ in range(4))
    for row, length in enumerate(mask.sum(1).tolist()):
        advantage = next_value = torch.zeros((), dtype=values.dtype)
        for t in reversed(range(length)):
            r = logprobs[row, t] - ref_logprobs[row, t]
            kls[row, t] = {"k1": r, "k2": r * r / 2, "k3": torch.exp(-r) - 1 + r}[estimator]
            rewards[row, t] = -kl_coef * kls[row, t] + (scores[row] if t == length - 1 else 0.0)
            delta = rewards[row, t] + gamma * next_value - values[row, t]
            advantage = delta + gamma * lam * advantage
            next_value = values[row, t]
            advantages[row, t] = advantage
            returns[row, t] = advantage + values[row, t]
    if whiten and mask.any():
        chosen = advantages[mask]
        advantages[mask] = (chosen - chosen.mean()) / torch.sqrt(chosen.var(correction=0) + WHITEN_EPSILON)
    return Targets(rewards, kls, advantages, returns)


def _check(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    scores: Tensor,
    kl: Tensor | None,
    *,
    estimator: str,
    gamma: float,
    lam: float,
) -> None:
    checks.require_mask(mask)
    if mask.dim() != 2:
        raise ValueError(f"mask must be [B, L], got {list(mask.shape)}")
    checks.require_float(logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, scores=scores, kl=kl)
    checks.require_shape(
        mask.shape, "[B, L], like mask", logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, kl=kl
    )
    checks.require_shape(mask.shape[:1], "[B], one per row", scores=scores)
    checks.require_device(
        mask, "mask", logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, scores=scores, kl=kl
    )
    checks.require(estimator in ESTIMATORS, f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    checks.require_within(0, 1, gamma=gamma, lam=lam)


# --- operator of torch.library: torch.compile and fake tensors pass through ------------------------------------------


@torch.library.custom_op(
    "gearshift::ppo_targets",
    mutates_args=(),
    schema="(Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor mask, Tensor scores, Tensor? kl, "
    "float kl_coef, str estimator, float gamma, float lam, bool whiten, str? group) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, scores: Tensor, kl: Tensor | None,
    kl_coef: float, estimator: str, gamma: float, lam: float, whiten: bool, group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The fields of `Targets`."""
    found = implementation(mask)(
        logprobs, ref_logprobs, values, mask, scores, kl, kl_coef, estimator, gamma, lam, whiten, group
    )
    rewards, kl, advantages, returns = (tensor.contiguous() for tensor in found)
    return rewards, kl, advantages, returns


@_forward.register_fake
def _(
    logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, scores: Tensor, kl: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = checks.accumulation_dtype(logprobs, ref_logprobs, values, scores, kl)
    rewards, kl, advantages, returns = (mask.new_empty(mask.shape, dtype=dtype) for _ in Targets._fields)
    return rewards, kl, advantages, returns
