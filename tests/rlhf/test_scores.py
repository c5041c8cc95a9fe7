"""What becomes of scores before they are rewards, iteration after iteration; and importance weights."""

import json
import math

import pytest
import torch

from gearshift.rlhf.ppo_settings import ScoreSettings
from gearshift.rlhf.scores import ScoreShaper, importance_weights

FINISHED = torch.tensor([True, False, True, True])


def batches(count: int = 5) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [3.0 + (i + 1) * torch.randn(4, generator=g) for i in range(count)]


def test_without_settings_scores_stay() -> None:
    shaper = ScoreShaper(ScoreSettings())
    for scores in batches():
        assert torch.equal(shaper(scores, FINISHED), scores)


def test_a_missing_eos_costs_the_penalty() -> None:
    found = ScoreShaper(ScoreSettings(missing_eos_penalty=1.5))(torch.tensor([1.0, 1.0, -2.0, 0.0]), FINISHED)
    assert found.tolist() == [1.0, -0.5, -2.0, 0.0]


def test_moments_are_those_of_all_scores_so_far() -> None:
    shaper, seen = ScoreShaper(ScoreSettings(missing_eos_penalty=2.0, normalize=True, clip=1.25)), []
    for scores in batches():
        seen += [s - (0.0 if f else 2.0) for s, f in zip(scores.tolist(), FINISHED.tolist(), strict=True)]
        mean = math.fsum(seen) / len(seen)
        deviation = math.sqrt(math.fsum((s - mean) ** 2 for s in seen) / len(seen))
        expected = [min(1.25, max(-1.25, (s - mean) / deviation)) for s in seen[-4:]]
        assert shaper(scores, FINISHED).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_state_goes_through_json() -> None:
    settings = ScoreSettings(normalize=True)
    through, again = ScoreShaper(settings), ScoreShaper(settings)
    *before, last = batches()
    for scores in before:
        through(scores, FINISHED)
    again.set_state(json.loads(json.dumps(through.state())))
    assert torch.equal(again(last, FINISHED), through(last, FINISHED))


def test_equal_scores_are_normalised_to_nothing() -> None:
    found = ScoreShaper(ScoreSettings(normalize=True))(torch.full((4,), 0.3), FINISHED)
    assert found.tolist() == pytest.approx([0.0] * 4, abs=1e-6)


def test_importance_weights_are_ratios_up_to_the_cap() -> None:
    """Masked places may hold anything."""
    rollout = torch.tensor([[-1.0, -2.0, -9.0], [-0.5, -0.5, math.nan]])
    training = torch.tensor([[-1.1, -1.0, -3.0], [-0.5, math.inf, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = importance_weights(training, rollout, mask, 2.0)
    expected = [[math.exp(-0.1), 2.0, 2.0], [1.0, 0.0, 0.0]]
    assert found.tolist() == [pytest.approx(row, rel=1e-6) for row in expected]
