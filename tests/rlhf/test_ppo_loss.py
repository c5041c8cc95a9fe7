"""The policy's loss, held against the papers' formulas in fp64; and what an iteration decides by."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.engine import Episodes
from gearshift.rlhf.kl import KlController
from gearshift.rlhf.ppo import Ppo
from gearshift.rlhf.ppo_settings import KlSettings, PpoSettings, StopSettings
from tests.rlhf.tiny import Recorder

ROWS, LONGEST, COEF = 5, 6, 0.7


class Said:
    """A policy whose log-probs and entropies are given."""

    def __init__(self, logprobs: Tensor, entropies: Tensor):
        self.found = logprobs, entropies

    def response_logprobs(self, batch: Episodes, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
        assert temperature == 0.8
        assert entropy
        return self.found


class Settings:
    def __init__(self, **ppo: Any):
        self.ppo = PpoSettings(**ppo)


def ppo_of(**settings: Any) -> Ppo:
    """One with settings alone: no model, no data."""
    run = Ppo.__new__(Ppo)
    run.config = Settings(**settings)  # type: ignore[assignment]
    run.kl, run.report = KlController(KlSettings(coef=COEF)), Recorder()
    run.sampling = type("At", (), {"temperature": 0.8})()  # type: ignore[assignment]
    return run


def episodes() -> tuple[Episodes, Tensor, Tensor]:
    """A minibatch, with the new log-probs and entropies; weights up to 2, ratios on both sides of every clip."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(LONGEST) < torch.tensor([[6], [1], [4], [3], [6]])

    def noise(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(ROWS, LONGEST, generator=g) * mask

    row, old = torch.arange(ROWS), (noise() - 2) * mask
    weights = torch.rand(ROWS, LONGEST, generator=g) * 2 * mask
    ref, advantages = old + noise(0.5), noise(2.0)
    batch = Episodes(
        tokens=row[:, None], lengths=row, ids=row, draws=row, samples=row, responses=row[:, None].expand(-1, LONGEST),
        logprobs=old, mask=mask, finished=row > 0, ref_logprobs=ref, values=noise(), scores=noise()[:, 0],
        rewards=noise(), kl=noise(), advantages=advantages, returns=noise(), weights=weights,
    )  # fmt: skip
    return batch, (old + noise(0.8)).requires_grad_(), noise().abs()


def by_hand(batch: Episodes, new: Tensor, count: int, dual: float | None, estimator: str | None) -> float:
    total = 0.0
    for b, t in batch.mask.nonzero().tolist():
        ratio = math.exp(float(new[b, t]) - float(batch.logprobs[b, t]))
        weighed = float(batch.advantages[b, t]) * float(batch.weights[b, t])
        term = min(ratio * weighed, min(1.3, max(0.7, ratio)) * weighed)
        if dual is not None and weighed < 0:
            term = max(term, dual * weighed)
        r = float(new[b, t]) - float(batch.ref_logprobs[b, t])
        penalty = {None: 0.0, "k2": r * r / 2, "k3": math.exp(-r) - 1 + r}[estimator]
        total += COEF * penalty - term
    return total / count


@pytest.mark.parametrize(("dual", "estimator"), [(None, None), (1.5, None), (None, "k2"), (1.5, "k3")])
def test_the_loss_and_its_gradient(dual: float | None, estimator: Any) -> None:
    """Clipped surrogate of weighed advantages, dual clip, and the penalty as a term of it."""
    batch, new, entropies = episodes()
    kl = KlSettings(where="loss", estimator=estimator) if estimator else KlSettings()
    run, count = ppo_of(clip=0.3, dual_clip=dual, kl=kl), 17
    found = run.policy_loss(Said(new, entropies), batch, torch.tensor(float(count)))  # type: ignore[arg-type]
    exact = new.detach().double()
    assert float(found.loss.detach()) == pytest.approx(by_hand(batch, exact, count, dual, estimator), rel=1e-5)
    assert float(found.metrics["entropy"]) == pytest.approx(float(entropies.sum()), rel=1e-6)
    found.loss.backward()
    assert new.grad is not None
    step = 1e-6
    for b, t in batch.mask.nonzero().tolist():
        up, down = exact.clone(), exact.clone()
        up[b, t] += step
        down[b, t] -= step
        slope = (by_hand(batch, up, count, dual, estimator) - by_hand(batch, down, count, dual, estimator)) / (2 * step)
        assert float(new.grad[b, t]) == pytest.approx(slope, rel=1e-4, abs=1e-6)
    assert (new.grad[~batch.mask] == 0).all()


def test_which_policy_may_be_the_best() -> None:
    near, far = {"validation/kl": 1.9}, {"validation/kl": 2.1}
    assert [ppo_of(best_kl=2.0).near_reference(found) for found in (near, far)] == [True, False]
    assert ppo_of().near_reference(far)


def test_when_the_entropy_is_spent() -> None:
    run = ppo_of(stop=StopSettings(entropy=1.5))
    assert [run.is_spent({"objective/entropy": entropy}) for entropy in (1.6, 1.4)] == [False, True]
    assert not ppo_of().is_spent({"objective/entropy": 0.0})


def test_whose_log_probs_the_ratio_is_against() -> None:
    """The training forward's with `old_logprobs: training`, weighed if a cap is set; else the rollout's, whatever is
    known of the others."""
    batch, _, _ = episodes()
    trained = (batch.logprobs + 0.5) * batch.mask
    for settings in ({}, {"kl": KlSettings(estimator="exact")}):
        assert ppo_of(**settings).as_trained(batch, trained) == (batch, None)
    found, weights = ppo_of(old_logprobs="training").as_trained(batch, trained)
    assert found.logprobs is trained
    assert weights is None
    found, weights = ppo_of(old_logprobs="training", importance_cap=1.5).as_trained(batch, trained)
    assert found.logprobs is trained
    assert weights is not None
    torch.testing.assert_close(weights, 1.5 * batch.mask.float())
    _, weights = ppo_of(old_logprobs="training", importance_cap=9.0).as_trained(batch, trained)
    assert weights is not None
    torch.testing.assert_close(weights, math.exp(0.5) * batch.mask.float())
