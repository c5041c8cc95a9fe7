"""The coefficient of the KL penalty: fixed, or adapted to a target."""

from __future__ import annotations

from gearshift.rlhf.settings import KlSettings


class KlController:
    """β of the per-token reward −β·KL.

    Without a target β stays (InstructGPT: 0.02). With one it is adapted after each iteration (Ziegler et al.
    1909.08593, 2.2): e = clip(KL / target − 1, −0.2, 0.2), β ← β·(1 + e·episodes / horizon). The factor is positive
    as long as the horizon is longer than a fifth of an iteration, which every config is held to.
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
        error = min(0.2, max(-0.2, kl / self._settings.target - 1.0))
        self.coef *= 1.0 + error * episodes / self._settings.horizon
