"""Optimizer state that steps aside to the host while the policy writes.

DeepSpeed's own `offload_states(include=[optim_states, hp_params])` does this for its FusedAdam alone; Gearshift's
optimizers are torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class OptimizerState:
    """The fp32 master weights and the moments of a DeepSpeed ZeRO-3 optimizer on this rank, and `more` tensors.

    Host memory for them is taken once, page-locked where there is a GPU, and kept. (On a CPU nothing is gained: it is
    the same memory.)
    """

    def __init__(self, optimizer: Any, device: torch.device, more: Sequence[Tensor] = ()):
        self._optimizer, self._device, self._more = optimizer, device, more
        self._hosts: dict[int, Tensor] = {}
        self._aside: list[tuple[Tensor, Tensor]] = []

    def leave(self) -> None:
        """To the host. Until `come_back`, no step may be taken."""
        pairs = [(tensor, self._host(tensor)) for tensor in self._tensors()]
        for tensor, host in pairs:
            host.copy_(tensor.data, non_blocking=True)
        self._synchronize()  # the host's copies are whole before the device's are gone
        for tensor, host in pairs:
            tensor.data = host
        self._hosts = {id(tensor): host for tensor, host in pairs}
        self._aside = pairs

    def come_back(self) -> None:
        for tensor, host in self._aside:
            tensor.data = torch.empty_like(host, device=self._device, pin_memory=False)
            tensor.data.copy_(host, non_blocking=True)
        self._synchronize()
        self._aside = []

    def _tensors(self) -> list[Tensor]:
        """All that the optimizer alone reads: not masters that are the very shards, as they are in fp32."""
        shards = {t.untyped_storage().data_ptr() for group in self._optimizer.fp16_partitioned_groups for t in group}
        state = [t for values in self._optimizer.optimizer.state.values() for t in values.values()]
        found = [*self._optimizer.fp32_partitioned_groups_flat, *self._more, *(t for t in state if torch.is_tensor(t))]
        here = (t for t in found if t.device.type == self._device.type and t.numel() > 1)  # a step's number may stay
        return [t for t in here if t.untyped_storage().data_ptr() not in shards]

    def _host(self, tensor: Tensor) -> Tensor:
        known = self._hosts.get(id(tensor))
        if known is not None and known.shape == tensor.shape and known.dtype == tensor.dtype:
            return known
        return torch.empty_like(tensor.data, device="cpu", pin_memory=self._device.type != "cpu")

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
