"""The hybrid engine: one policy, two gears. ZeRO-3 for training, tensor parallel for rollouts.

On one rank both gears read the same weights, and nothing shifts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Self

from torch import Tensor

from gearshift.engine.causal import CausalModel
from gearshift.engine.counting import count_shift
from gearshift.engine.decoder import Recorder, recorder_of
from gearshift.engine.distributed import now
from gearshift.engine.flash import flash_kernel
from gearshift.engine.generator import Generator
from gearshift.engine.memory import Releasable
from gearshift.engine.offload import OptimizerState
from gearshift.engine.replica import Replica
from gearshift.engine.reshard import ReshardPlan
from gearshift.engine.settings import check_shift
from gearshift.engine.sharded import check_shards, held_names, weights_in_place, zero_shards
from gearshift.engine.shift import Shift
from gearshift.engine.spans import span
from gearshift.engine.tensor_parallel import TensorParallelGroup

# A larger cache of keys and values is not worth its memory in training: to capture its graphs again takes little of the
# time of a rollout that fills it.
KEPT_CACHE_BYTES = 4 << 30


class HybridEngine(CausalModel):
    """A ZeRO-3 causal LM that can `rollout()`: shift into a tensor-parallel replica and generate with it.

    `tp_size`: ranks that hold one replica together; `slots`: rows decoded at once by such a group (None: all);
    `bucket_bytes`: the most that a rank sends or receives in one exchange of the shift; `keep_weights`: the replica's
    weights and the shift's buffers stay in memory between rollouts, at the same addresses; `offload_optimizer`: the
    optimizer's state lies in host memory during rollouts; `attention`: of decoding, "sdpa" or "flash" (flash-attn);
    `record_steps`: steps of decoding are recorded (see `decoder`), and with `keep_weights` replayed in later rollouts,
    for which the cache of keys and values is kept as well, if it takes no more than `KEPT_CACHE_BYTES`.

    Of the last rollout: `shift_seconds` (0 where the replica had the newest weights already), `allocation_seconds` for
    the memory of weights that had not been kept, `capture_seconds` for recording steps, `offload_seconds` for the
    optimizer state's way to the host and back;
    `shift_bytes` that this rank received, `shift_bytes_between_hosts` of them from other hosts.
    """

    def __init__(
        self,
        *args: Any,
        tp_size: int = 1,
        slots: int | None = None,
        bucket_bytes: int = 64 << 20,
        keep_weights: bool = True,
        offload_optimizer: bool = False,
        attention: str = "sdpa",
        record_steps: bool = True,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        check_shards(self.module, self.world.size)
        self.group = TensorParallelGroup(self.world, tp_size)
        self.slots, self.bucket_bytes, self.keep_weights = slots, bucket_bytes, keep_weights
        self._flash = flash_kernel(self.dtype, self.world.device) if attention == "flash" else None
        self._record_steps = record_steps
        self._recorder: type[Recorder] | None = None
        self.shift_seconds = self.allocation_seconds = self.capture_seconds = self.offload_seconds = 0.0
        self.shift_bytes = self.shift_bytes_between_hosts = 0
        average = self.average.shards if self.average is not None else []
        aside = offload_optimizer and self.training is not None
        self._optimizer_state = OptimizerState(self.engine.optimizer, self.world.device, average) if aside else None
        self._gear_of: _Gear | None = None

    @property
    def _replica(self) -> Replica | None:
        return None if self._gear_of is None else self._gear_of.replica

    @property
    def _shift(self) -> Shift | None:
        return None if self._gear_of is None else self._gear_of.shift

    @classmethod
    def load(
        cls, *args: Any, deepspeed_extra: dict[str, Any] | None = None, offload_optimizer: bool = False, **kwargs: Any
    ) -> Self:
        """See `CausalModel.load`. Raises SettingError for ways of sharding that the shift does not know."""
        check_shift(deepspeed_extra or {}, offload_optimizer)
        return super().load(*args, deepspeed_extra=deepspeed_extra, offload_optimizer=offload_optimizer, **kwargs)

    @contextmanager
    def rollout(self) -> Iterator[Generator]:
        """Shift the current weights into the rollout gear; the ZeRO-3 shards are only read. Collective."""
        # A replica may read the files of a frozen model in place.
        in_place = self.placed() if self.training is None and self.world.size == 1 else nullcontext()
        with self._optimizer_aside(), in_place, self._newest_weights() as replica:
            generator = Generator(replica, self.world, self.slots, self.stamp)
            replica.decoder.seconds = 0.0
            try:
                yield generator
            finally:
                generator.close()
                self.capture_seconds = replica.decoder.seconds
                self._leave_cache(replica)

    def _leave_cache(self, replica: Replica) -> None:
        """Free the keys and values, and the graphs that read them, unless these are to be replayed again. Ranks that
        replay graphs together decide alike: their caches are of one size."""
        replays = self.keep_weights and replica.decoder.records
        if not (replays and replica.cache.held_bytes <= KEPT_CACHE_BYTES):
            replica.decoder.forget()
            replica.cache.free()

    @contextmanager
    def _optimizer_aside(self) -> Iterator[None]:
        self.offload_seconds = 0.0
        if self._optimizer_state is None:
            yield
            return
        start = now(self.world.device)
        self._optimizer_state.leave()
        self.offload_seconds = now(self.world.device) - start
        try:
            yield
        finally:
            start = now(self.world.device)
            self._optimizer_state.come_back()
            self.offload_seconds += now(self.world.device) - start

    @contextmanager
    def _newest_weights(self) -> Iterator[Replica]:
        """The replica with the weights that are in place now; moves nothing when it has them already."""
        gear = self._gear()
        try:
            self._bring(gear)
            yield gear.replica
        finally:
            if not self.keep_weights:
                gear.release()

    @span("shift")
    def _bring(self, gear: _Gear) -> None:
        self.shift_seconds = self.allocation_seconds = 0.0
        self.shift_bytes = self.shift_bytes_between_hosts = 0
        if gear.shift is not None and gear.replica.stamp != self.stamp:
            start = now(self.world.device)
            gear.restore()
            allocated = now(self.world.device)
            gear.replica.stamp = None  # what a shift that fails leaves behind is of no step
            moved = gear.shift.run(zero_shards(self.module))
            count_shift(gear.replica)
            self.allocation_seconds, self.shift_seconds = allocated - start, now(self.world.device) - allocated
            self.shift_bytes, self.shift_bytes_between_hosts = moved.received, moved.between_hosts
        gear.replica.stamp = self.stamp

    def _gear(self) -> _Gear:
        """What the first rollout builds, and all others use, unless weights that are read in place have moved."""
        weights = weights_in_place(self.module, self.world.device) if self.world.size == 1 else None
        places = None if weights is None else {name: t.data_ptr() for name, t in weights.items()}
        if self._gear_of is None or self._gear_of.places != places:
            self._gear_of = self._new_gear(weights, places)
        return self._gear_of

    def _new_gear(self, weights: dict[str, Tensor] | None, places: dict[str, int] | None) -> _Gear:
        if self._record_steps and self._recorder is None:
            self._recorder = recorder_of(self.group, self.dtype, self.world.device)
        device = self.world.device
        replica = Replica(self.config, self.group, self.dtype, device, self._recorder, self._flash, weights)
        replica.take_buffers(self.module)
        if weights is not None:
            return _Gear(replica, None, places)
        plan = ReshardPlan.build(
            replica.shapes,
            replica.layout.splits,
            self.group.placement,
            max(1, self.bucket_bytes // self.dtype.itemsize),
            held_names(self.module),
        )
        return _Gear(replica, Shift(plan, self.world, replica.slices), None)


class _Gear:
    """The rollout model and what brings its weights; `shift` None: it reads ZeRO-3's own, at `places`."""

    def __init__(self, replica: Replica, shift: Shift | None, places: dict[str, int] | None):
        self.replica, self.shift, self.places = replica, shift, places
        self._memory = None if shift is None else Releasable(replica.slices.values())

    def restore(self) -> None:
        """Memory for weights that come, and for the way."""
        if self.shift is not None and self._memory is not None:
            self._memory.restore()
            self.shift.buffers.restore()

    def release(self) -> None:
        """The memory of weights that are a copy, and what they came by."""
        self.replica.stamp = None
        if self.shift is not None and self._memory is not None:
            self._memory.release()
            self.shift.buffers.release()
