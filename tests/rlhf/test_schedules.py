"""Learning rates as factors of the peak."""

from itertools import pairwise

import pytest

from gearshift.rlhf.schedules import constant, cosine


def test_warm_up_from_one_tenth() -> None:
    """PPO (InstructGPT C.4): 10 steps from 0.1 in equal parts, then 1 for ever."""
    factor = constant(10, first=0.1)
    rates = [factor(step) for step in range(13)]
    assert rates[:11] == pytest.approx([0.1 + 0.09 * step for step in range(11)])
    assert rates[10:] == [1.0, 1.0, 1.0]
    assert factor(10**6) == 1.0


def test_warm_up_from_nothing_never_has_a_step_of_zero() -> None:
    assert [constant(4)(step) for step in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_without_warm_up_it_is_one() -> None:
    assert [constant(0, first=0.1)(step) for step in range(3)] == [1.0, 1.0, 1.0]
    assert constant(0)(0) == 1.0


def test_cosine_ends_at_one_tenth() -> None:
    """The last step that is taken has the final rate; half-way it is the mean of both."""
    factor = cosine(101, 0, 0.1)
    rates = [factor(step) for step in range(101)]
    assert rates[0] == 1.0
    assert rates[50] == pytest.approx(0.55)
    assert rates[25] == pytest.approx(0.1 + 0.9 * 0.8535534)
    assert rates[100] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates))
    assert factor(5000) == pytest.approx(0.1)


def test_cosine_after_a_warm_up() -> None:
    rates = [cosine(25, 4, 0.2)(step) for step in range(25)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[14] == pytest.approx(0.6)
    assert rates[24] == pytest.approx(0.2)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (3, 3), (2, 5)])
def test_short_runs_have_rates_above_zero(steps: int, warmup: int) -> None:
    assert all(0 < cosine(steps, warmup, 0.1)(step) <= 1 for step in range(steps))
