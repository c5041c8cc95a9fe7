"""Intervals, win rates and distinct-n against other ways to compute them."""

import math
import random
import statistics

import pytest

from gearshift.rlhf.statistics import bootstrap_mean, distinct, wins


def test_the_bootstrap_of_many_values_is_the_normal_interval() -> None:
    """n = 2,000: the central limit theorem gives mean ± 1.96·s/√n; the bootstrap of 2,000 resamples is within 8%."""
    rng = random.Random(0)
    values = [rng.expovariate(1.0) for _ in range(2_000)]
    found = bootstrap_mean(values, 2_000, seed=1)
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert found.mean - found.low == pytest.approx(half, rel=0.08)
    assert found.high - found.mean == pytest.approx(half, rel=0.08)


def test_the_bootstrap_of_yes_and_no_has_binomial_quantiles() -> None:
    """A resample of 12 yes and 18 no is a binomial count of n = 30, p = 0.4: its exact 2.5% and 97.5% quantiles."""
    found = bootstrap_mean([1.0] * 12 + [0.0] * 18, 4_000, seed=3)
    cumulated, quantiles = 0.0, []
    for k in range(31):
        before, cumulated = cumulated, cumulated + math.comb(30, k) * 0.4**k * 0.6 ** (30 - k)
        quantiles += [k / 30 for level in (0.025, 0.975) if before < level <= cumulated]
    assert (found.low, found.high) == pytest.approx(quantiles)
    assert quantiles == pytest.approx([7 / 30, 17 / 30])


def test_an_interval_covers_its_mean_about_95_times_in_100() -> None:
    """200 samples of 60 from a skewed law of mean 1: a count below 0.89 or above 0.99 is 4 standard errors out."""
    rng = random.Random(5)
    covered = 0
    for trial in range(200):
        found = bootstrap_mean([rng.expovariate(1.0) for _ in range(60)], 400, seed=trial)
        covered += found.low <= 1 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_one_value_and_equal_values_have_no_spread() -> None:
    for values in ([2.5], [2.5] * 7):
        found = bootstrap_mean(values, 100, seed=0)
        assert (found.low, found.mean, found.high) == (2.5, 2.5, 2.5)


def test_the_draws_are_those_of_the_seed_and_shared_by_values_of_the_same_prompts() -> None:
    rng = random.Random(1)
    one = [rng.gauss(0, 1) for _ in range(50)]
    again, moved = bootstrap_mean(one, 300, seed=9), bootstrap_mean([3 + 2 * v for v in one], 300, seed=9)
    assert bootstrap_mean(one, 300, seed=9) == again
    assert bootstrap_mean(one, 300, seed=10) != again
    assert (moved.low, moved.high) == pytest.approx((3 + 2 * again.low, 3 + 2 * again.high))


@pytest.mark.parametrize(("values", "resamples"), [([], 10), ([1.0], 0)])
def test_nothing_to_resample_is_an_error(values: list[float], resamples: int) -> None:
    with pytest.raises(ValueError, match="needs values and resamples"):
        bootstrap_mean(values, resamples, seed=0)


def test_figures_are_named_after_what_they_estimate() -> None:
    found = bootstrap_mean([1.0, 1.0], 10, seed=0)
    assert found.fields("score") == {"score": 1.0, "score_low": 1.0, "score_high": 1.0}


def test_wins_count_ties_half_and_the_same_answer_as_a_tie() -> None:
    assert wins([1.0, 0.0, 2.0, 2.0], [0.0, 1.0, 2.0, 1.9999999], [False, False, False, True]) == [1.0, 0.0, 0.5, 0.5]


def test_distinct_of_texts_counted_by_hand() -> None:
    """Seven words, four of them different (a b c d); pairs a b, b a, a b, c d: three different ones over seven."""
    texts = ["a b a b", "c  d\n", "a", ""]
    assert distinct(texts, 1) == pytest.approx(4 / 7)
    assert distinct(texts, 2) == pytest.approx(3 / 7)
    assert distinct(["", " "], 1) == 0.0
    assert distinct(["one"], 2) == 0.0
