"""The KL penalty: its coefficient, fixed or adapted to a target, and its form as a term of the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from gearshift.rlhf.ppo_settings import KlSettings


class KlController:
    """β of the per-token reward −β·KL.

    Without a target β stays (InstructGPT: 0.02). With one it is adapted after each iteration (Ziegler et al.
    1909.08593, 2.2): e = clip(KL / target − 1, −0.2, 0.2), β ← β·(1 + e·episodes / horizon), 0.2 being the field
    `clamp`. The factor is positive as long as the horizon is longer than that part of an iteration, which every config
    is held to.
    """

    def __init__(self, settings: KlSettings):
        self._settings = settings
        self.coef = settings.coef

    def state(self) -> float:
        """What a checkpoint holds of it."""
        return self.coef

    def set_state(self, state: float) -> None:
        self.coef = state

    def update(self, kl: float, episodes: int) -> None:
        """`kl`: mean KL per response of the iteration, nats."""
        if self._settings.target is None:
            return
        clamp = self._settings.clamp
        error = min(clamp, max(-clamp, kl / self._settings.target - 1.0))
        self.coef *= 1.0 + error * episodes / self._settings.horizon


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: str) -> Tensor:
    """Estimates [B, L] of the KL to the reference at sampled tokens, 0 where masked; differentiable in `logprobs`.

    k2 = r²/2, k3 = e^−r − 1 + r, r = logprobs − ref_logprobs (Schulman, "Approximating KL divergence"). The gradient of
    k1 has the mean 0 whatever the reference is: it is no penalty in a loss.
    """
    ratio = torch.where(mask, logprobs - ref_logprobs, 0.0)
    return ratio.square() / 2 if estimator == "k2" else torch.expm1(-ratio) + ratio
