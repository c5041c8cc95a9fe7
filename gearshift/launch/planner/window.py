"""The weights that ZeRO-3 has gathered at each moment of a pass: DeepSpeed's coordinator, played through on paper.

It fetches a layer's weights before the layer runs, then those of the layers to come, as far as `prefetch` elements and
no more than `max_live` in all, and lets go of a layer's weights when they will not be used again within `max_reuse`
elements of the trace (`partitioned_param_coordinator.py`, with a complete trace, which every pass but the first two
has). What it lets go of in a forward pass it has found out once, from a pass without a backward one, as every model of
a PPO run makes first; so nothing is kept for the backward pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gearshift.engine.whole import AT_ONCE


@dataclass(frozen=True)
class ZeroSettings:
    """Of `deepspeed.zero_optimization`, in elements; the defaults are DeepSpeed's."""

    reduce_bucket: int = 500_000_000
    prefetch: int = 50_000_000
    persistence: int = 100_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    offload_optimizer: bool = False
    offload_param: bool = False

    @classmethod
    def of(cls, deepspeed: dict[str, Any]) -> ZeroSettings:
        """From a config's `deepspeed:` section."""
        zero = deepspeed.get("zero_optimization") or {}
        names = {
            "reduce_bucket": "reduce_bucket_size", "prefetch": "stage3_prefetch_bucket_size",
            "persistence": "stage3_param_persistence_threshold", "max_live": "stage3_max_live_parameters",
            "max_reuse": "stage3_max_reuse_distance", "sub_group": "sub_group_size",
        }  # fmt: skip
        given: dict[str, Any] = {own: int(zero[name]) for own, name in names.items() if name in zero}
        away = {
            own: (zero.get(own) or {}).get("device", "none") != "none" for own in ("offload_optimizer", "offload_param")
        }
        return cls(**given, **away)


def comes_whole(numel: list[int], zero: ZeroSettings) -> bool:
    """Whether `engine.whole` gathers the weights of a model, in one piece, or DeepSpeed's hooks do."""
    return not zero.offload_param and sum(n for n in numel if n > zero.persistence) <= zero.prefetch


class WholeWindow:
    """As `Window`, of weights that come in one piece before the first pass and go after the last."""

    left = 0

    def __init__(self, numel: list[int], ranks: int, itemsize: int, zero: ZeroSettings):
        away = [-(-n // ranks) * ranks for n in numel if n > zero.persistence] if ranks > 1 else []
        self.bytes = sum(away) * itemsize
        self.peak = self.bytes + min(sum(away), AT_ONCE) * itemsize

    def fetch(self, layer: Iterable[int], module: int = 0) -> None: ...

    def release(self, layer: Iterable[int], module: int = 0) -> None: ...

    def keep(self, p: int) -> None: ...

    def drop(self, p: int) -> None: ...


class Window:
    """`bytes`: of gathered weights, `peak` counting copies made on the way; persistent ones, which are always there,
    are left out of both.

    `sequence`: the parameters of each layer that is entered in a pass, in order, of which the first `forward` are the
    forward pass; `numel`: of each parameter.
    """

    def __init__(
        self,
        sequence: list[list[int]],
        forward: int,
        numel: list[int],
        ranks: int,
        itemsize: int,
        zero: ZeroSettings,
    ):
        self._sequence, self._numel, self._ranks, self._itemsize, self._zero = sequence, numel, ranks, itemsize, zero
        self._step, self._forward = 0, forward
        self._available = {p for p, n in enumerate(numel) if n <= zero.persistence}
        self._persistent = frozenset(self._available)
        self._queue = deque((p, step) for step, layer in enumerate(sequence) for p in sorted(set(layer)))
        self._fetched_for: dict[int, int] = {}
        self._needed: dict[int, int] = {}  # how often autograd keeps a view of what is gathered
        self._orphans: dict[int, int] = {}  # bytes of what is released and kept all the same
        self._in_flight: dict[int, _Group] = {}
        self._active: dict[int, set[int]] = {}  # the modules that use a parameter
        self._live = 0  # elements, as DeepSpeed counts them
        self.bytes = self.peak = 0

    def fetch(self, layer: Iterable[int], module: int = 0) -> None:
        """The next layer of the sequence begins, that of the module of this number."""
        wanted = sorted(set(layer))
        self._gather([p for p in wanted if not self._is_there(p)])
        for p in wanted:
            self._active.setdefault(p, set()).add(module)
            self._wait(p)
        waiting = {p for p in wanted if self._fetched_for.get(p, -1) < self._step}
        while self._queue and waiting:
            p, step = self._queue.popleft()
            self._fetched_for[p] = step
            waiting.discard(p)
        self._prefetch()
        self._step += 1

    def release(self, layer: Iterable[int], module: int = 0) -> None:
        """A layer ends."""
        layer = set(layer)
        kept = self._used_soon()
        for p in layer:
            self._active.setdefault(p, set()).discard(module)
            away = p in self._available and p not in self._persistent and not self._active[p]
            if away and p not in kept and not self._is_kept_for_later(p):
                self._available.discard(p)
                self._live -= self._numel[p]
                if self._needed.get(p):
                    self._orphans[p] = self._orphans.get(p, 0) + self._bytes(p)
                else:
                    self.bytes -= self._bytes(p)

    def keep(self, p: int) -> None:
        """Autograd has saved a view of a gathered weight, whose memory then stays."""
        self._needed[p] = self._needed.get(p, 0) + 1

    def drop(self, p: int) -> None:
        """Autograd needs that view no more."""
        self._needed[p] -= 1
        if not self._needed[p]:
            self.bytes -= self._orphans.pop(p, 0)

    @property
    def left(self) -> int:
        """Bytes that stay after the pass, until the model's next one."""
        return self.bytes

    @property
    def _in_forward(self) -> bool:
        return self._step <= self._forward

    def _is_kept_for_later(self, p: int) -> bool:
        """Fetched already for a later use in the trace (of the forward pass, while that lasts)."""
        return not self._in_forward and self._fetched_for.get(p, -1) > self._step

    def _is_there(self, p: int) -> bool:
        return p in self._available or p in self._in_flight

    def _bytes(self, p: int) -> int:
        if self._ranks == 1 and not self._zero.offload_param:
            return 0  # the shard is the whole
        return -(-self._numel[p] // self._ranks) * self._ranks * self._itemsize

    def _gather(self, parameters: list[int]) -> None:
        if not parameters:
            return
        self._live += sum(self._numel[p] for p in parameters)
        group = _Group(parameters, sum(map(self._bytes, parameters)))
        self._in_flight |= dict.fromkeys(parameters, group)
        self._take(group.bytes)

    def _wait(self, p: int) -> None:
        group = self._in_flight.pop(p, None)
        if group is None:
            return
        if len(group.parameters) > 1 and not group.copied and self._ranks > 1:
            self._take(group.bytes)  # each parameter is copied out of what was gathered at once
            group.copied = True
        self._available.add(p)
        group.waiting -= 1
        if not group.waiting and group.copied:
            self.bytes -= group.bytes

    def _take(self, size: int) -> None:
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _prefetch(self) -> None:
        room = min(self._zero.max_live - self._live, self._zero.prefetch)
        ahead: list[int] = []
        count = 0
        while self._queue and count < room:
            p, step = self._queue.popleft()
            self._fetched_for[p] = max(self._fetched_for.get(p, -1), step)
            if not self._is_there(p) and p not in ahead:
                ahead.append(p)
                count += self._numel[p]
        self._gather(ahead)

    def _used_soon(self) -> set[int]:
        """What the next layers use, up to `max_reuse` elements."""
        found: set[int] = set()
        passed = 0
        end = self._forward if self._in_forward else len(self._sequence)
        for layer in self._sequence[self._step : end]:
            if passed >= self._zero.max_reuse:
                break
            found.update(layer)
            passed += sum(self._numel[p] for p in layer)
        return found


@dataclass
class _Group:
    """Parameters that one all-gather brings."""

    parameters: list[int]
    bytes: int
    copied: bool = False

    def __post_init__(self) -> None:
        self.waiting = len(self.parameters)
