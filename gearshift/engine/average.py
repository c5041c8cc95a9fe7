"""The exponential moving average of a policy's weights (InstructGPT, appendix C), on each rank's own shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class WeightAverage:
    """mean ← decay·mean + (1 − decay)·weights after each optimizer step; the mean starts as the weights are.

    In fp32, from the fp32 master weights of DeepSpeed's ZeRO-3 `optimizer`: 4 bytes a parameter over all ranks, nothing
    is gathered. Weights that do not train are no part of it.
    """

    def __init__(self, optimizer: Any, decay: float):
        self._optimizer, self.decay = optimizer, decay
        self.shards = [flat.detach().clone() for flat in optimizer.fp32_partitioned_groups_flat]

    @torch.no_grad()
    def update(self) -> None:
        """An optimizer step was taken."""
        for mean, flat in zip(self.shards, self._optimizer.fp32_partitioned_groups_flat, strict=True):
            mean.lerp_(flat.detach(), 1.0 - self.decay)

    def load(self, shards: list[Tensor] | None) -> None:
        """What a checkpoint holds of it; None, of a run without one: it starts from the weights as they are."""
        masters = self._optimizer.fp32_partitioned_groups_flat
        for mean, other in zip(self.shards, masters if shards is None else shards, strict=True):
            mean.copy_(other.detach())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model's weights are the mean, in the model's own type, and afterwards what they were, bit for bit.

        Collective: small parameters, which DeepSpeed keeps whole on every rank, are gathered anew. No step may be taken
        meanwhile. In memory the weights are held twice.
        """
        flats = self._optimizer.fp16_partitioned_groups_flat  # whatever the weights' type
        kept = [flat.detach().clone() for flat in flats]
        self._put(self.shards)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, shards: list[Tensor]) -> None:
        # As an optimizer step does: no parameter is whole while its shards change, or it would be left as it is.
        self._optimizer.parameter_offload.partition_all_parameters()
        for flat, other in zip(self._optimizer.fp16_partitioned_groups_flat, shards, strict=True):
            flat.copy_(other)
        whole = self._optimizer.persistent_parameters
        if whole:
            whole[0].all_gather(whole)
