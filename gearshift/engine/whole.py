"""Weights of a ZeRO-3 model that come and go in one piece.

DeepSpeed gathers a module's weights when the module is called, through hooks before and after every module in either
pass. A model that is so small that it would be fetched ahead as a whole has its weights gathered once here, for as many
micro-batches as follow, and no such hooks. On one rank nothing comes or goes, and the hooks would find nothing to do.

Letters: N ranks, n elements of a chunk of a rank's shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.engine.distributed import World
from gearshift.engine.mapped import MappedWeights
from gearshift.engine.memory import Scratch
from gearshift.engine.neighbours import Neighbours, neighbours
from gearshift.engine.sharded import has_own_memory, lay_together

AT_ONCE = 1 << 21  # elements that a collective leaves before each weight takes its own
_ALIGNED = 64  # elements: where a weight may begin


class WholeWeights:
    """Of one model. `placed` puts them into its parameters for a while."""

    def __init__(self, module: Any, near: Neighbours | None):
        parameters = list(module.parameters())
        self._kept = [p for p in parameters if p.ds_persist]
        self._runs = _runs([p for p in parameters if not p.ds_persist], near)
        self._trains = any(p.requires_grad for p in parameters)
        self._mapped: MappedWeights | None = getattr(module, "mapped", None)
        self._depth = 0
        # A forward outside of `placed` finds them too; what a backward pass may need stays until `leave`.
        module.register_forward_pre_hook(lambda *_: self._enter())
        module.register_forward_hook(lambda *_: self._after_forward())

    @classmethod
    def of(cls, engine: Any, world: World) -> WholeWeights | None:
        """None, and DeepSpeed's hooks stay, where its weights are more than `stage3_prefetch_bucket_size` elements, or
        are not plainly cut over all ranks of the world."""
        parameters = list(engine.module.parameters())
        quantized = engine.zero_quantized_weights() or engine.zero_quantized_nontrainable_weights()
        alike = len({p.dtype for p in parameters}) == 1
        everywhere = all(dist.get_world_size(p.ds_process_group) == world.size for p in parameters)
        plain = (
            alike
            and everywhere
            and not quantized
            and not engine.zero_offload_param()
            and engine.zero_hpz_partition_size() == 1
        )
        away = sum(p.ds_numel for p in parameters if not p.ds_persist)
        if not plain or away > engine.zero_prefetch_bucket_size():
            return None
        getattr(engine.optimizer, "parameter_offload", engine.optimizer)._remove_module_hooks()
        return cls(engine.module, neighbours(world))

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Forward and backward passes in here find every weight. Collective; inside of another one it costs nothing."""
        self._enter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.leave()

    def leave(self) -> None:
        """What is not kept whole goes, if it is there: before shards change, for one thing."""
        for run in self._runs:
            run.release()
        if self._mapped is not None:
            self._mapped.leave()

    def _enter(self) -> None:
        if self._mapped is not None:
            self._mapped.check()
        if not all(_is_there(p) for p in self._kept):
            self._kept[0].all_gather(self._kept)
        for run in self._runs:
            run.gather()

    def _after_forward(self) -> None:
        if not self._depth and not (self._trains and torch.is_grad_enabled()):
            self.leave()


class _Run:
    """Parameters whose shards lie in one piece of memory. Between them may be some that every rank keeps whole."""

    def __init__(self, parameters: list[Any], near: Neighbours | None):
        self._near = near
        self._parameters = sorted(parameters, key=lambda p: p.ds_tensor.storage_offset())
        self._group = parameters[0].ds_process_group
        self._ranks = dist.get_world_size(self._group)
        self._first, last = self._parameters[0].ds_tensor, self._parameters[-1].ds_tensor
        self._starts = [p.ds_tensor.storage_offset() - self._first.storage_offset() for p in self._parameters]
        self._length = self._starts[-1] + last.numel()
        self._wholes = self._take()
        self._memory = Scratch(self._wholes[0])
        self._memory.release()

    def release(self) -> None:
        from deepspeed.runtime.zero.partition_parameters import free_param

        for parameter in self._parameters:
            if _is_there(parameter):
                free_param(parameter)
        self._memory.release()

    @torch.no_grad()
    def gather(self) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if all(_is_there(p) for p in self._parameters):
            return
        self._memory.take()
        shards = self._first.as_strided((self._length,), (1,))
        for start, found in self._gathered(shards) if self._near is None else self._near.gathered(shards):
            self._hand_out(found, start)
        for parameter, whole in zip(self._parameters, self._wholes, strict=True):
            parameter.data = whole.view(-1)[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE

    def _gathered(self, shards: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Chunk by chunk: where it starts in the shards, and [N, n] of it."""
        step = max(1, AT_ONCE // self._ranks)
        for start in range(0, self._length, step):
            own = shards[start : start + step]
            found = own.new_empty(self._ranks, len(own))
            dist.all_gather_into_tensor(found.view(-1), own, group=self._group)
            yield start, found

    def _take(self) -> list[Tensor]:
        """Of each parameter [N, its part of a shard], in one piece of memory."""
        sizes = [self._ranks * p.ds_tensor.numel() for p in self._parameters]
        parts = self._first.new_empty(sum(map(_aligned, sizes))).split([_aligned(size) for size in sizes])
        return [part[:size].view(self._ranks, -1) for part, size in zip(parts, sizes, strict=True)]

    def _hand_out(self, found: Tensor, start: int) -> None:
        """found [N, n]: what begins at `start` in the shards of all ranks, into the whole weights."""
        end = start + found.shape[1]
        for at, whole in zip(self._starts, self._wholes, strict=True):
            low, high = max(at, start), min(at + whole.shape[1], end)
            if low < high:
                whole[:, low - at : high - at] = found[:, low - start : high - start]


def _runs(parameters: list[Any], near: Neighbours | None) -> list[_Run]:
    """In the same order on all ranks. Frozen shards, which are alone in their memory, are laid together; others lie in
    the optimizer's."""
    alone = [p for p in parameters if not p.requires_grad and has_own_memory(p)]
    if alone:
        lay_together(alone)
    pieces: dict[int, list[Any]] = {}
    for p in parameters:
        pieces.setdefault(p.ds_tensor.untyped_storage().data_ptr(), []).append(p)
    return [_Run(piece, near) for piece in pieces.values()]


def _is_there(parameter: Any) -> bool:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    there: bool = parameter.ds_status == ZeroParamStatus.AVAILABLE
    return there


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
