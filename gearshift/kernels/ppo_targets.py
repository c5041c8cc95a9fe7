"""From log-probs, values and scores to rewards, advantages and returns.

Rewards: InstructGPT (arXiv 2203.02155), section 3.5; KL estimators: Schulman, "Approximating KL divergence" (2020);
advantages: GAE (arXiv 1506.02438), equations 11 to 16. Letters: B sequences, L response length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from gearshift.kernels import checks
from gearshift.kernels.losses import log_ratio

WHITEN_EPSILON = 1e-8

# Each takes the log-ratio r = log π − log π_ref of a token sampled from π.
ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda r: r,
    "k2": lambda r: 0.5 * r.square(),
    "k3": lambda r: torch.expm1(-r) + r,
}


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


def implementation(mask: Tensor) -> Callable[..., Targets]:
    """The function that serves this device."""
    if mask.is_cuda:
        from gearshift.kernels import ppo_targets_triton

        return ppo_targets_triton.ppo_targets
    return vectorized


def vectorized(
    logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, scores: Tensor, kl: Tensor | None,
    kl_coef: float, estimator: str, gamma: float, lam: float, whiten: bool, group: str | None,
) -> Targets:  # fmt: skip
    """By operations on all sequences at once; `group` by its name. fp64 stays fp64."""
    holes = (mask[:, 1:] & ~mask[:, :-1]).any()
    checks.require(not holes, "mask must be right-padded: a response token follows a masked one")
    dtype = checks.accumulation_dtype(logprobs, ref_logprobs, values, scores, kl)

    def unmasked(tensor: Tensor) -> Tensor:
        return torch.where(mask, tensor.to(dtype), 0.0)

    if kl is None:
        ratio = log_ratio(unmasked(logprobs), unmasked(ref_logprobs))
        kl = torch.where(mask, ESTIMATORS[estimator](ratio), 0.0)
    else:
        kl = unmasked(kl)
    values = unmasked(values)
    rewards = _rewards(kl, scores.to(dtype), mask, kl_coef)
    deltas = rewards + gamma * _next(values) - values
    advantages = suffix_sums(deltas, gamma * lam)
    returns = advantages + values
    if whiten:
        advantages = _whiten(advantages, mask, group)
    return Targets(rewards, kl, torch.where(mask, advantages, 0.0), torch.where(mask, returns, 0.0))


def suffix_sums(terms: Tensor, decay: float) -> Tensor:
    """out[:, t] = Σ_j decay^j · terms[:, t + j], in log2(L) steps (20 times as fast as a loop over L at 512×1,024).

    After the step of width k, each entry sums k terms: S_2k[t] = S_k[t] + decay^k · S_k[t + k].
    """
    total, width = terms.clone(), 1
    while width < terms.shape[1]:
        later = total[:, width:] * decay
        total[:, :-width] += later
        decay, width = decay * decay, width * 2
    return total


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


def _next(tensor: Tensor) -> Tensor:
    """`tensor [B, L]` one step later, 0 (False) past the end."""
    return torch.cat([tensor[:, 1:], torch.zeros_like(tensor[:, :1])], dim=1)


def _rewards(kl: Tensor, scores: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    last = mask & ~_next(mask)
    # Without a penalty an infinite KL costs nothing (0·inf would be NaN).
    penalty = kl * -kl_coef if kl_coef else torch.zeros_like(kl)
    return penalty + torch.where(last, scores[:, None], 0.0)


def _whiten(advantages: Tensor, mask: Tensor, group: str | None) -> Tensor:
    moments = merge_moments(row_moments(advantages, mask))
    count, mean, m2 = merge_moments(gather(moments[None], group))
    deviation = torch.sqrt(m2 / count.clamp(min=1.0) + WHITEN_EPSILON)
    # In fp64: an fp32 tensor minus an fp64 scalar would round the mean to fp32 first.
    whitened: Tensor = (advantages.double() - mean) / deviation
    return whitened.to(advantages.dtype)


def row_moments(values: Tensor, mask: Tensor) -> Tensor:
    """`[B, 3]` fp64: count, mean and sum of squared deviations of each row's unmasked values (0, 0, 0 for none)."""
    wide = torch.where(mask, values.double(), 0.0)
    count = mask.sum(1).double()
    mean = wide.sum(1) / count.clamp(min=1.0)
    m2 = torch.where(mask, (wide - mean[:, None]).square(), 0.0).sum(1)
    return torch.stack([count, mean, m2], dim=1)


def merge_moments(moments: Tensor) -> Tensor:
    """`[K, 3] -> [3]`: the moments of K groups together, in their order (Chan et al. 1979)."""
    counts, means, m2s = moments.unbind(1)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1.0)
    m2 = m2s.sum() + (counts * (means - mean).square()).sum()
    return torch.stack([count, mean, m2])


def gather(moments: Tensor, group: str | None) -> Tensor:
    """`[1, 3] -> [ranks, 3]`, in their order. The group goes by its name, all that an operator can be given."""
    if group is None:
        return moments
    ranks = _resolve_process_group(cast(Any, group))
    parts = [torch.empty_like(moments) for _ in range(dist.get_world_size(ranks))]
    dist.all_gather(parts, moments, group=ranks)
    return torch.cat(parts)


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
