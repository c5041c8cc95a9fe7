"""The coefficient of the KL penalty."""

import pytest

from gearshift.rlhf.kl import KlController
from gearshift.rlhf.settings import KlSettings


def test_without_a_target_it_is_fixed() -> None:
    controller = KlController(KlSettings(coef=0.02))
    for kl in (0.0, 5.0, 1e6):
        controller.update(kl, 512)
    assert controller.coef == 0.02


@pytest.mark.parametrize(
    ("kl", "error"),
    [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (7.2, 0.2), (60.0, 0.2), (0.0, -0.2), (-3.0, -0.2)],
)
def test_the_step_is_proportional_and_clipped(kl: float, error: float) -> None:
    """Ziegler et al. 2.2: e = clip(KL / target − 1, ±0.2), β ← β (1 + e · episodes / horizon)."""
    controller = KlController(KlSettings(coef=0.05, target=6.0, horizon=8_000))
    controller.update(kl, 500)
    assert controller.coef == pytest.approx(0.05 * (1 + error * 500 / 8_000), rel=1e-9)


def test_the_shortest_horizon_that_a_config_may_have_keeps_the_penalty_a_penalty() -> None:
    """A fifth of an iteration's 512 episodes, and one more: β shrinks to 1 − 102.4 / 103 of itself, and can grow."""
    controller = KlController(KlSettings(coef=0.05, target=6.0, horizon=103))
    controller.update(0.0, 512)
    assert controller.coef == pytest.approx(0.05 * 0.6 / 103, rel=1e-9)
    controller.update(60.0, 512)
    assert controller.coef == pytest.approx(0.05 * 0.6 / 103 * (1 + 102.4 / 103), rel=1e-9)


def test_it_steers_to_the_target() -> None:
    """A policy whose KL falls as β grows (KL = 0.3 / β) ends at the target."""
    controller = KlController(KlSettings(coef=0.02, target=6.0, horizon=2_000))
    for _ in range(400):
        controller.update(0.3 / controller.coef, 512)
    assert 0.3 / controller.coef == pytest.approx(6.0, rel=1e-3)
