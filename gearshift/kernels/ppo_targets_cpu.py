"""`ppo_targets` on processors: some sequences at a time, so that all that is read again is still in the cache.

Letters: B sequences, L response length, R sequences of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gearshift.kernels import checks
from gearshift.kernels.head import spans
from gearshift.kernels.losses import log_ratio
from gearshift.kernels.moments import WHITEN_EPSILON, gather, merge_moments

# Elements of a block, 512 KiB in fp32: few enough to stay in the cache, enough to be worth some forty operations.
BLOCK_ELEMENTS = 128 << 10

# Each takes the log-ratio r = log π − log π_ref of a token sampled from π.
ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda r: r,
    "k2": lambda r: 0.5 * r.square(),
    "k3": lambda r: torch.expm1(-r) + r,
}


def ppo_targets(
    logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, scores: Tensor, kl: Tensor | None,
    kl_coef: float, estimator: str, gamma: float, lam: float, whiten: bool, group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Rewards, KL, advantages, returns; `group` by its name. fp64 stays fp64."""
    dtype = checks.accumulation_dtype(logprobs, ref_logprobs, values, scores, kl)
    rewards, kls, advantages, returns = (torch.empty(mask.shape, dtype=dtype) for _ in range(4))
    lengths = _lengths(mask)
    moments = torch.zeros(mask.shape[0], 3, dtype=torch.float64)
    blocks = list(spans(mask.shape[0], max(1, BLOCK_ELEMENTS // max(1, mask.shape[1])))) if mask.numel() else []
    for rows in blocks:
        only = _Only(mask[rows], dtype)
        if kl is None:
            _estimate(kls[rows], only(logprobs[rows]), only(ref_logprobs[rows]), estimator)
        else:
            kls[rows] = only(kl[rows])
        _reward(rewards[rows], kls[rows], lengths[rows], scores[rows].to(dtype), kl_coef)
        value = only(values[rows])
        delta = rewards[rows] - value
        delta[:, :-1].add_(value[:, 1:], alpha=gamma)
        advantages[rows] = suffix_sums(delta, gamma * lam)
        torch.add(advantages[rows], value, out=returns[rows])
        if whiten:
            moments[rows] = _moments(advantages[rows], lengths[rows])
    if whiten:
        _whiten(advantages, mask, moments, group, blocks)
    return rewards, kls, advantages, returns


def _lengths(mask: Tensor) -> Tensor:
    """`[B]`: response tokens of each sequence. Raises ValueError unless they come first."""
    flags = mask.view(torch.uint8)
    checks.require(
        bool((flags[:, 1:] <= flags[:, :-1]).all()), "mask must be right-padded: a response token follows a masked one"
    )
    return flags.sum(1)


class _Only:
    """A tensor with 0 for what is masked, NaN and infinities too: by its bits, which `where` takes longer for."""

    def __init__(self, mask: Tensor, dtype: torch.dtype):
        self._dtype = dtype
        self._whole = torch.int64 if dtype == torch.float64 else torch.int32
        self._bits = mask.to(self._whole).neg_()  # all ones, or none

    def __call__(self, tensor: Tensor) -> Tensor:
        return torch.bitwise_and(tensor.to(self._dtype).view(self._whole), self._bits).view(self._dtype)


def _estimate(out: Tensor, new: Tensor, ref: Tensor, estimator: str) -> None:
    torch.sub(new, ref, out=out)
    if bool(out.sum().isnan()):  # −inf less −inf, or a true NaN: rare enough to look twice
        out.copy_(log_ratio(new, ref))
    if estimator != "k1":
        out.copy_(ESTIMATORS[estimator](out))


def _reward(out: Tensor, kl: Tensor, lengths: Tensor, scores: Tensor, kl_coef: float) -> None:
    """−kl_coef·KL, and the score at each row's last token."""
    if kl_coef:
        torch.mul(kl, -kl_coef, out=out)
    else:
        out.zero_()  # without a penalty an infinite KL costs nothing (0·inf would be NaN)
    score = torch.where(lengths > 0, scores, 0.0)
    out.scatter_add_(1, (lengths - 1).clamp_(min=0)[:, None], score[:, None])


def suffix_sums(terms: Tensor, decay: float) -> Tensor:
    """out[:, t] = Σ_j decay^j · terms[:, t + j] of `[R, L]`, in log2(L) steps, so that rounding grows with log2(L) too.

    After the step of width k, each entry sums k terms: S_2k[t] = S_k[t] + decay^k · S_k[t + k].
    """
    total, other, width = terms.clone(), torch.empty_like(terms), 1
    while width < terms.shape[1]:
        torch.add(total[:, :-width], total[:, width:], alpha=decay, out=other[:, :-width])
        other[:, -width:] = total[:, -width:]
        total, other = other, total
        decay, width = decay * decay, width * 2
    return total


def _moments(advantages: Tensor, lengths: Tensor) -> Tensor:
    """`[R, 3]` fp64 of each row's unmasked entries (the others are 0 already); 0, 0, 0 for a row without any."""
    wide = advantages.double()
    count = lengths.double()
    mean = wide.sum(1) / count.clamp(min=1.0)
    # The masked zeros' deviations are in the sum and taken out again: exact enough, and one pass less.
    deviations = wide.sub_(mean[:, None])
    m2 = torch.linalg.vecdot(deviations, deviations) - (advantages.shape[1] - count) * mean.square()
    return torch.stack([count, mean, m2.clamp(min=0.0)], dim=1)


def _whiten(advantages: Tensor, mask: Tensor, moments: Tensor, group: str | None, blocks: list[slice]) -> None:
    """In place; masked entries stay 0."""
    count, mean, m2 = merge_moments(gather(merge_moments(moments)[None], group))
    scale = 1.0 / torch.sqrt(m2 / count.clamp(min=1.0) + WHITEN_EPSILON)
    near = abs(float(mean * scale)) < 4.0  # then fp32 loses no more than its own rounding
    for rows in blocks:
        mine = advantages[rows]
        if near:
            mine.mul_(float(scale)).sub_(float(mean * scale))
        else:
            mine.copy_(mine.double().sub_(mean).mul_(scale))
        mine.copy_(_Only(mask[rows], mine.dtype)(mine))
