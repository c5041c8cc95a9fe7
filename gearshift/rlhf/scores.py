"""From the scores of a reward model to the scores that rewards are made of. Letters: B answers of an iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from gearshift.rlhf.ppo_settings import ScoreSettings


class ScoreShaper:
    """Penalty for a missing EOS, then running normalisation, then a bound; what is not set does nothing.

    The moments are those of all scores so far, the present iteration's included, the penalty in them (Welford's
    algorithm, joined by Chan et al.). They are the same on every rank when every rank passes the same scores.
    """

    def __init__(self, settings: ScoreSettings):
        self._settings = settings
        self._count, self._mean, self._squares = 0.0, 0.0, 0.0

    def state(self) -> list[float]:
        """What a checkpoint holds of it: count, mean, sum of squared deviations."""
        return [self._count, self._mean, self._squares]

    def set_state(self, state: list[float]) -> None:
        self._count, self._mean, self._squares = state

    def __call__(self, scores: Tensor, finished: Tensor) -> Tensor:
        """scores [B], finished [B] bool -> [B] fp32."""
        s = self._settings
        shaped = scores.double() - s.missing_eos_penalty * (~finished).double()
        if s.normalize:
            self._join(shaped)
            deviation = (self._squares / self._count) ** 0.5
            shaped = (shaped - self._mean) / max(deviation, 1e-8)
        if s.clip is not None:
            shaped = shaped.clamp(-s.clip, s.clip)
        return shaped.float()

    def _join(self, values: Tensor) -> None:
        count, mean = len(values), float(values.mean())
        squares = float((values - mean).square().sum())
        total, apart = self._count + count, mean - self._mean
        self._squares += squares + apart * apart * self._count * count / total
        self._mean += apart * count / total
        self._count = total


def importance_weights(training: Tensor, rollout: Tensor, mask: Tensor, cap: float) -> Tensor:
    """min(π_training / π_rollout, cap) of each token, 0 where masked; from log-probs [B, L].

    Truncated importance sampling: tokens were drawn from the rollout's distribution, the gradient is the training
    forward's (Espeholt et al. 2018, arXiv 1802.01561, section 4.1, bound their weights alike).
    """
    return torch.where(mask, (training - rollout).exp().clamp(max=cap), 0.0)
