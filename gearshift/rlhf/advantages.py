"""Advantages without a critic: an answer against the other answers to its prompt. Letters: B answers, G prompts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-4  # added to a group's deviation, so that a group of equal rewards has advantages of 0


def grpo(rewards: Tensor, groups: Tensor) -> Tensor:
    """(r − mean of its group) / (deviation of its group + 1e-4): DeepSeekMath, arXiv 2402.03300, section 4.1.2.

    rewards [B]; groups [B] int64: which prompt each answers. -> [B], in fp64.
    """
    return _centred(rewards, groups) / (_deviations(rewards, groups) + EPSILON)


def rloo(rewards: Tensor, groups: Tensor) -> Tensor:
    """r − mean of the others of its group: REINFORCE leave-one-out, arXiv 2402.14740, section 3.2. See `grpo`."""
    sizes = _sums(torch.ones_like(rewards, dtype=torch.float64), groups)
    return _centred(rewards, groups) * sizes / (sizes - 1).clamp(min=1)


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"grpo": grpo, "rloo": rloo}


def _centred(rewards: Tensor, groups: Tensor) -> Tensor:
    sizes = _sums(torch.ones_like(rewards, dtype=torch.float64), groups)
    return rewards.double() - _sums(rewards, groups) / sizes


def _deviations(rewards: Tensor, groups: Tensor) -> Tensor:
    """Of each answer's group: the sample's deviation (divided by n − 1)."""
    sizes = _sums(torch.ones_like(rewards, dtype=torch.float64), groups)
    return (_sums(_centred(rewards, groups).square(), groups) / (sizes - 1).clamp(min=1)).sqrt()


def _sums(values: Tensor, groups: Tensor) -> Tensor:
    """[B]: the sum over each one's group, in fp64."""
    _, index = groups.unique(return_inverse=True)
    total = torch.zeros(int(index.max()) + 1, dtype=torch.float64, device=values.device)
    return total.index_add_(0, index, values.double())[index]
