"""The KL penalty: its coefficient, and as a term of a loss."""

import math

import pytest
import torch

from gearshift.rlhf.kl import KlController, kl_penalty
from gearshift.rlhf.ppo_settings import KlSettings


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


def test_fifty_steps_of_another_computation() -> None:
    """Ziegler et al. 2.2 in logarithms, with a clamp of its own, over a KL that swings around its target."""
    controller = KlController(KlSettings(coef=0.02, target=6.0, horizon=3_000, clamp=0.15))
    log_coef = math.log(0.02)
    for step in range(50):
        kl = 6.0 + 4.0 * math.sin(step * 0.7) + 0.05 * step
        controller.update(kl, 512)
        log_coef += math.log1p(max(-0.15, min(0.15, (kl - 6.0) / 6.0)) * 512 / 3_000)
        assert controller.coef == pytest.approx(math.exp(log_coef), rel=1e-12)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_as_a_term_of_a_loss(estimator: str) -> None:
    """Values and gradients in fp64 by the formulas; masked places, which may hold anything, have neither."""
    g = torch.Generator().manual_seed(0)
    new = torch.randn(3, 5, generator=g, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(3, 5, generator=g, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    reference[~mask] = math.nan
    found = kl_penalty(new, reference, mask, estimator)
    found.sum().backward()
    assert new.grad is not None
    for b in range(3):
        for t in range(5):
            r = float(new.detach()[b, t]) - float(reference[b, t])
            value, slope = (r * r / 2, r) if estimator == "k2" else (math.exp(-r) - 1 + r, 1 - math.exp(-r))
            inside = bool(mask[b, t])
            assert float(found.detach()[b, t]) == pytest.approx(value if inside else 0.0, abs=1e-12)
            assert float(new.grad[b, t]) == pytest.approx(slope if inside else 0.0, abs=1e-12)
