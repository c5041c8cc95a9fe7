"""By how much the policy's training forward disagrees with the rollout that it is to learn from."""

from __future__ import annotations

import torch
from torch import Tensor

from gearshift.engine import World
from gearshift.errors import EveryRank


class LogprobGap:
    """|rollout - training forward| log-prob of the tokens that it is shown, nats: the largest in fp32, where the two
    differ by rounding alone; the mean in bf16.
    """

    def __init__(self, world: World, dtype: torch.dtype, limit: float):
        self.world, self.limit, self._exact = world, limit, dtype == torch.float32
        self._largest = self._sum = self._count = 0.0
        self.value = 0.0  # once checked

    def see(self, trained: Tensor, rollout: Tensor, mask: Tensor) -> None:
        """Log-probs [B, L] by both; without gradients."""
        gaps = (trained.detach() - rollout).abs()[mask].double()
        if len(gaps):  # a rank's rows may have no token
            # NaN is the larger one, on whichever side it stands.
            largest = float(gaps.max())
            self._largest = largest if not largest <= self._largest else self._largest
            self._sum, self._count = self._sum + float(gaps.sum()), self._count + len(gaps)

    def check(self) -> float:
        """The gap of all ranks. Collective. Raises EveryRank past the limit: PPO's ratio would start away from 1."""
        own = self._largest if self._exact else self._sum / max(1.0, self._count)
        self.value = self.world.max(own)
        if not self.value <= self.limit:
            raise EveryRank(
                f"rollout.logprob_gap_limit: rollout and training log-probs differ by {self.value:.3g} nats, "
                f"limit {self.limit:.3g}"
            )
        return self.value
