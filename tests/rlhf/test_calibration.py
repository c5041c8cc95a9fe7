"""Accuracy, its interval and calibration, against sums written out and against their meaning in many drawn samples."""

from __future__ import annotations

import math

import pytest
import torch

from gearshift.rlhf.calibration import accuracy_interval, calibration_error, pair_sums, wilson


def one_pair_each(gaps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[N]` gaps of the preferred answer, as `[N, 2, 2]` gaps and pairs."""
    both = torch.zeros(len(gaps), 2, 2, dtype=gaps.dtype)
    both[:, 0, 1], both[:, 1, 0] = gaps, -gaps
    return both, torch.tensor([[False, True], [False, False]]).expand(len(gaps), 2, 2)


def sums_of(gaps: torch.Tensor, pairs: torch.Tensor) -> dict[str, float]:
    sums = {name: float(value) for name, value in pair_sums(gaps, pairs).items()}
    return sums | {"pairs": float(pairs.sum()), "right": float((pairs & (gaps > 0)).sum())}


def test_wilson_is_the_textbook_s() -> None:
    assert wilson(0.1, 100) == pytest.approx((0.0552, 0.1744), abs=1e-4)  # Brown, Cai, DasGupta (2001)
    assert wilson(1.0, 10) == pytest.approx((10 / (10 + 1.959964**2), 1.0))


def test_of_independent_pairs_the_interval_is_wilson_s() -> None:
    gaps, pairs = one_pair_each(torch.tensor([1.0] * 70 + [-1.0] * 30))
    assert accuracy_interval(sums_of(gaps, pairs)) == pytest.approx(wilson(0.7, 99))
    assert accuracy_interval(sums_of(*one_pair_each(torch.ones(20)))) == wilson(1.0, 20)
    assert accuracy_interval(sums_of(gaps[:1], torch.zeros_like(pairs[:1]))) == (0.0, 1.0)


def test_pairs_of_one_prompt_do_not_count_as_independent() -> None:
    """Ten prompts whose six pairs are all right or all wrong tell as much as ten pairs."""
    order = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1).expand(10, 4, 4)
    sign = torch.tensor([1.0] * 7 + [-1.0] * 3)[:, None, None]
    gaps = sign * (torch.arange(4.0)[None, :] - torch.arange(4.0)[:, None]).expand(10, 4, 4)
    assert accuracy_interval(sums_of(gaps, order)) == pytest.approx(wilson(0.7, 9), abs=1e-6)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Prompts of six pairs, alike to some degree: of 600 samples of 60 prompts, about 95% cover the true accuracy."""
    g = torch.Generator().manual_seed(0)
    order = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
    covered = narrow = 0
    for _ in range(600):
        own = torch.tensor([0.5, 0.9])[torch.randint(0, 2, (60,), generator=g)]  # accuracy of a prompt: 0.7 on average
        right = torch.rand(60, 4, 4, generator=g) < own[:, None, None]
        gaps = torch.where(right, 1.0, -1.0)
        sums = sums_of(gaps, order.expand(60, 4, 4))
        low, high = accuracy_interval(sums)
        covered += low <= 0.7 <= high
        low, high = wilson(sums["right"] / sums["pairs"], sums["pairs"])
        narrow += low <= 0.7 <= high
    assert 0.93 <= covered / 600 <= 0.975
    assert narrow / 600 < 0.9, "as if all pairs were independent, the interval is too narrow"


def test_calibration_is_that_of_a_loop_over_bins() -> None:
    gaps = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    bins: dict[int, list[tuple[float, bool]]] = {}
    for gap in gaps.tolist():
        p = 1 / (1 + math.exp(-gap))
        confidence = max(p, 1 - p)
        bins.setdefault(int((confidence - 0.5) / 0.05), []).append((confidence, p > 0.5))
    expected = sum(abs(sum(c for c, _ in b) - sum(right for _, right in b)) for b in bins.values()) / 400
    assert calibration_error(sums_of(*one_pair_each(gaps))) == pytest.approx(expected, abs=1e-12)
    assert len(bins) == 10


def test_a_model_that_is_as_often_right_as_it_says_has_no_error() -> None:
    g = torch.Generator().manual_seed(2)
    size = torch.rand(200_000, generator=g, dtype=torch.float64) * 4
    right = torch.rand(200_000, generator=g, dtype=torch.float64) < torch.sigmoid(size)
    assert calibration_error(sums_of(*one_pair_each(torch.where(right, size, -size)))) < 0.005
    too_sure = torch.where(right, 3 * size, -3 * size)
    assert calibration_error(sums_of(*one_pair_each(too_sure))) > 0.08
