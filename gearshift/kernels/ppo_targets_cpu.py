"""`ppo_targets` on processors: through the compiled library, or through torch where it was not built and in fp64.

Letters: B sequences, L response length.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch
from torch import Tensor

from gearshift.kernels import checks, native
from gearshift.kernels.losses import log_ratio
from gearshift.kernels.moments import WHITEN_EPSILON, gather, merge_moments

# Each takes the log-ratio r = log π − log π_ref of a token sampled from π. The library knows them by their order.
ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda r: r,
    "k2": lambda r: 0.5 * r.square(),
    "k3": lambda r: torch.expm1(-r) + r,
}

Results = tuple[Tensor, Tensor, Tensor, Tensor]  # rewards, KL, advantages, returns
RIGHT_PADDED = "mask must be right-padded: a response token follows a masked one"


def ppo_targets(
    logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, scores: Tensor, kl: Tensor | None,
    kl_coef: float, estimator: str, gamma: float, lam: float, whiten: bool, group: str | None,
) -> Results:  # fmt: skip
    """`group` by its name. fp64 stays fp64."""
    dtype = checks.accumulation_dtype(logprobs, ref_logprobs, values, scores, kl)
    way = through_torch if native.built() is None or dtype == torch.float64 else compiled
    first, second, third, fourth = (x.to(dtype) for x in (logprobs, ref_logprobs, values, scores))
    given = None if kl is None else kl.to(dtype)
    return way(first, second, third, fourth, given, mask, kl_coef, estimator, gamma, lam, whiten, group)


class _Settings(ctypes.Structure):
    _fields_ = [
        ("kl_coef", ctypes.c_double),
        ("gamma", ctypes.c_double),
        ("lam", ctypes.c_double),
        ("estimator", ctypes.c_int64),
        ("whiten", ctypes.c_int64),
    ]


def compiled(
    logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, scores: Tensor, kl: Tensor | None, mask: Tensor,
    kl_coef: float, estimator: str, gamma: float, lam: float, whiten: bool, group: str | None,
) -> Results:  # fmt: skip
    """Every sequence is read once, and its sums are in fp64; rows are shared out among threads."""
    rows, length = mask.shape
    inputs = [None if x is None else x.contiguous() for x in (logprobs, ref_logprobs, values, mask, scores, kl)]
    rewards, kls, advantages, returns = outputs = [torch.empty(rows, length) for _ in range(4)]
    moments = torch.zeros(rows, 3, dtype=torch.float64)
    settings = _Settings(kl_coef, gamma, lam, list(ESTIMATORS).index(estimator), whiten)
    pointers = [*map(native.pointer, inputs), ctypes.byref(settings), *map(native.pointer, [*outputs, moments])]
    targets = native.function("ppo_targets", "iii" + "p" * len(pointers))
    failed = native.over_rows(lambda first, last: targets(first, last, length, *pointers), rows)
    checks.require(not any(failed), RIGHT_PADDED)
    if whiten:
        merged = torch.zeros(1, 3, dtype=torch.float64)
        native.function("merge_moments", "ipp")(rows, moments.data_ptr(), merged.data_ptr())
        rest = (moments.data_ptr(), *_mean_and_scale(merged, group), advantages.data_ptr())
        whitened = native.function("whiten", "iiipddp")
        native.over_rows(lambda first, last: whitened(first, last, length, *rest), rows)
    return rewards, kls, advantages, returns


def through_torch(
    logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, scores: Tensor, kl: Tensor | None, mask: Tensor,
    kl_coef: float, estimator: str, gamma: float, lam: float, whiten: bool, group: str | None,
) -> Results:  # fmt: skip
    checks.require(bool((mask[:, 1:] <= mask[:, :-1]).all()), RIGHT_PADDED)
    absent, lengths = ~mask, mask.sum(1)
    if kl is None:
        kl = ESTIMATORS[estimator](log_ratio(logprobs, ref_logprobs))
    kl = kl.masked_fill(absent, 0.0)
    values = values.masked_fill(absent, 0.0)
    # Without a penalty an infinite KL costs nothing (0·inf would be NaN).
    rewards = -kl_coef * kl if kl_coef else torch.zeros_like(kl)
    if mask.numel():
        score = scores.masked_fill(lengths == 0, 0.0)
        rewards.scatter_add_(1, (lengths - 1).clamp(min=0)[:, None], score[:, None])
    delta = rewards - values
    delta[:, :-1] += gamma * values[:, 1:]
    advantages = suffix_sums(delta, gamma * lam)
    returns = advantages + values
    if whiten:
        moments = _moments(advantages, mask, lengths)
        mean, scale = _mean_and_scale(merge_moments(moments)[None], group)
        advantages = ((advantages.double() - mean) * scale).to(delta.dtype).masked_fill(absent, 0.0)
    return rewards, kl, advantages, returns


def suffix_sums(terms: Tensor, decay: float) -> Tensor:
    """out[:, t] = Σ_j decay^j · terms[:, t + j] of `[B, L]`, in log2(L) steps, so that rounding grows with log2(L) too.

    After the step of width k, each entry sums k terms: S_2k[t] = S_k[t] + decay^k · S_k[t + k].
    """
    total, other, width = terms.clone(), torch.empty_like(terms), 1
    while width < terms.shape[1]:
        torch.add(total[:, :-width], total[:, width:], alpha=decay, out=other[:, :-width])
        other[:, -width:] = total[:, -width:]
        total, other = other, total
        decay, width = decay * decay, width * 2
    return total


def _moments(advantages: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    """`[B, 3]` fp64 of each row's unmasked entries; 0, 0, 0 for a row without any."""
    wide, count = advantages.double(), lengths.double()
    mean = wide.sum(1) / count.clamp(min=1.0)
    deviations = (wide - mean[:, None]).masked_fill(~mask, 0.0)
    return torch.stack([count, mean, deviations.square().sum(1)], dim=1)


def _mean_and_scale(mine: Tensor, group: str | None) -> tuple[float, float]:
    """Of all ranks, from this one's count, mean and sum of squared deviations `[1, 3]` (fp64)."""
    count, mean, m2 = (mine[0] if group is None else merge_moments(gather(mine, group))).tolist()
    return mean, 1.0 / math.sqrt(m2 / max(count, 1.0) + WHITEN_EPSILON)
