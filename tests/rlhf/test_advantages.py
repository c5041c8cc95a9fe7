"""Advantages from the other answers to a prompt: what loops say is in test_episodes.py; here what must not happen."""

import math

import pytest
import torch

from gearshift.rlhf.advantages import METHODS, grpo, rloo


def test_by_hand() -> None:
    """Two prompts with three and two answers, in any order."""
    rewards, groups = torch.tensor([1.0, 10.0, 2.0, 6.0, 20.0]), torch.tensor([7, 3, 7, 7, 3])
    assert rloo(rewards, groups).tolist() == pytest.approx([1 - 4, 10 - 20, 2 - 3.5, 6 - 1.5, 20 - 10])
    deviations = math.sqrt((4 + 1 + 9) / 2), math.sqrt(50)
    expected = [-2 / deviations[0], -5 / deviations[1], -1 / deviations[0], 3 / deviations[0], 5 / deviations[1]]
    assert grpo(rewards, groups).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_equal_rewards_teach_nothing(method: str) -> None:
    """Of rewards whose mean rounds, too."""
    rewards, groups = torch.tensor([0.1] * 6 + [1e6 + 0.3] * 3), torch.tensor([0] * 6 + [1] * 3)
    assert METHODS[method](rewards, groups).abs().max() < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_an_answer_alone_is_finite(method: str) -> None:
    assert METHODS[method](torch.tensor([3.0]), torch.tensor([5])).tolist() == [0.0]


@pytest.mark.parametrize("method", METHODS)
def test_the_sum_of_a_group_is_nothing(method: str) -> None:
    g = torch.Generator().manual_seed(0)
    rewards, groups = torch.randn(40, generator=g) * 100, torch.arange(40) % 8
    found = METHODS[method](rewards, groups)
    assert found.dtype == torch.float64
    assert torch.zeros(8, dtype=torch.float64).index_add_(0, groups, found).abs().max() < 1e-10
