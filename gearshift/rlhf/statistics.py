"""What a comparison says of its answers: means and win rates with bootstrap intervals, and how varied the words are.

Letters: n prompts, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class Estimate:
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float

    def fields(self, name: str) -> dict[str, float]:
        """As plain figures: `name`, `name_low`, `name_high`."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}


def bootstrap_mean(values: Sequence[float], resamples: int, seed: int) -> Estimate:
    """The mean of n values with its percentile bootstrap interval (Efron 1979; `LEVEL`).

    A resample draws n of the values with replacement; the interval's ends are quantiles of the R means of resamples.
    The draws are a function of n, R and the seed alone: values of the same prompts are resampled together.
    """
    if not values or resamples < 1:
        raise ValueError(f"a bootstrap needs values and resamples, not {len(values)} and {resamples}")
    given = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.array([given[rng.integers(len(given), size=len(given))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(given.mean()), float(low), float(high))


def wins(own: Sequence[float], others: Sequence[float], same: Sequence[bool]) -> list[float]:
    """For each prompt 1 where the own value is above the other's, 0 where it is below, 1/2 for a tie.

    `same`: the two answers are one and the same text, so they tie whatever rounding did to their scores.
    """
    return [
        0.5 if equal or mine == theirs else float(mine > theirs)
        for mine, theirs, equal in zip(own, others, same, strict=True)
    ]


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words in all texts together, over all their words (Li et al. 2016, section 5.4.1).

    Words are what white space parts; no n-gram spans two texts. 0 where there is no word.
    """
    words = [text.split() for text in texts]
    grams = {tuple(row[at : at + n]) for row in words for at in range(len(row) - n + 1)}
    total = sum(map(len, words))
    return len(grams) / total if total else 0.0
