"""How good a reward model is on held-out pairs: how often it is right, how sure that figure is, how sure it may be.

Letters: B prompts, K answers to a prompt.

The reward model's probability that answer i is preferred to answer j is sigma(r_i - r_j) (Bradley and Terry).
Everything is made from sums, which ranks and micro-batches add up before anything is divided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

BINS = 10
Z = 1.959964  # of 95% of a normal distribution


def pair_sums(gaps: Tensor, pairs: Tensor) -> dict[str, Tensor]:
    """Sums over the pairs of `[B, K, K]`: gaps r_i − r_j, and whether i was preferred to j.

    Per prompt, for the interval: "prompts" with a pair, "right_right", "right_pairs", "pairs_pairs". Per bin b of the
    confidence max(p, 1 − p), in 0.5 ... 1: "bin_b_pairs", "bin_b_right", "bin_b_confidence".
    """
    right = (pairs & (gaps > 0)).flatten(1).sum(1).double()
    count = pairs.flatten(1).sum(1).double()
    sums = {
        "prompts": (count > 0).sum().double(),
        "right_right": (right * right).sum(),
        "right_pairs": (right * count).sum(),
        "pairs_pairs": (count * count).sum(),
    }
    own = gaps[pairs].double()
    confidence = torch.sigmoid(own.abs())
    bins = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    for name, values in (("pairs", torch.ones_like(own)), ("right", (own > 0).double()), ("confidence", confidence)):
        binned = values.new_zeros(BINS).index_add(0, bins, values)
        sums |= {f"bin_{b}_{name}": binned[b] for b in range(BINS)}
    return sums


def calibration_error(sums: Mapping[str, float]) -> float:
    """Expected calibration error (Guo et al., 1706.04599): the mean over pairs of |accuracy − confidence| of a bin."""
    gaps = [abs(sums[f"bin_{b}_right"] - sums[f"bin_{b}_confidence"]) for b in range(BINS)]
    return sum(gaps) / max(1.0, sums["pairs"])


def accuracy_interval(sums: Mapping[str, float]) -> tuple[float, float]:
    """The 95% interval of the accuracy, right / pairs; (0, 1) without a pair.

    Wilson's, at the number of independent pairs that tell as much: those of one prompt are not independent, so the
    variance between prompts (of the ratio, linearised) takes the place of the binomial one (Kish's design effect).
    """
    pairs, prompts = sums["pairs"], sums["prompts"]
    if not pairs:
        return 0.0, 1.0
    accuracy = sums["right"] / pairs
    binomial = accuracy * (1 - accuracy) / pairs
    squares = sums["right_right"] - 2 * accuracy * sums["right_pairs"] + accuracy**2 * sums["pairs_pairs"]
    between = squares / pairs**2 * prompts / max(1.0, prompts - 1)
    # All right or all wrong: no prompt differs from another, so nothing tells the pairs of one apart.
    effective = pairs * binomial / between if binomial > 0 and between > 0 else prompts
    return wilson(accuracy, min(effective, pairs))


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95% interval (1927) of a share of `count` independent trials."""
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)
