"""The hybrid engine: one policy, two gears. ZeRO-3 for training, tensor parallel for rollouts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gearshift.engine.causal import CausalModel
from gearshift.engine.distributed import TensorParallelGroup
from gearshift.engine.generator import Generator
from gearshift.engine.replica import Replica
from gearshift.engine.reshard import ReshardPlan
from gearshift.engine.shift import Shift, zero_shards


class HybridEngine(CausalModel):
    """A ZeRO-3 causal LM that can `rollout()`: shift into a tensor-parallel replica and generate with it.

    `tp_size`: ranks that hold one replica together; `slots`: rows decoded at once by such a group (None: all);
    `bucket_bytes`: bound on what one exchange of the shift moves to a rank.
    `shift_seconds` and `shift_bytes`: what the last shift took and what this rank received in it.
    """

    def __init__(
        self, *args: Any, tp_size: int = 1, slots: int | None = None, bucket_bytes: int = 64 << 20, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.group = TensorParallelGroup(self.world, tp_size)
        self.slots, self.bucket_bytes = slots, bucket_bytes
        self.shift_seconds, self.shift_bytes = 0.0, 0
        self._replica: Replica | None = None
        self._shift: Shift | None = None

    @contextmanager
    def rollout(self) -> Iterator[Generator]:
        """Shift the current weights into the rollout gear; the ZeRO-3 shards are only read. Collective."""
        replica = self._shifted()
        generator = Generator(replica, self.world, self.slots, self.steps)
        try:
            yield generator
        finally:
            generator.close()
            replica.cache.free()

    def _shifted(self) -> Replica:
        """The replica with the weights of the newest optimizer step; moves nothing when it has them already."""
        if self._replica is None or self._shift is None:
            self._replica = Replica(self.config, self.group, self.dtype, self.world.device)
            self._replica.take_buffers(self.module)
            plan = ReshardPlan.build(
                self._replica.shapes,
                self._replica.layout.splits,
                self.group.placement,
                self.bucket_bytes // torch.finfo(self.dtype).bits * 8,
            )
            self._shift = Shift(plan, self.world)
        self.shift_seconds, self.shift_bytes = 0.0, 0
        if self._replica.stamp != self.steps:
            start = time.perf_counter()
            self.shift_bytes = self._shift.run(zero_shards(self.module), self._replica.slices)
            if self.world.device.type != "cpu":
                torch.accelerator.synchronize()
            self.shift_seconds = time.perf_counter() - start
            self._replica.stamp = self.steps
        return self._replica
