"""The most memory that one micro-batch takes beside what a model always holds: activations, gathered weights, gradients
on their way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gearshift.launch.planner.tracing import Timeline
from gearshift.launch.planner.window import WholeWindow, Window, ZeroSettings, comes_whole


@dataclass(frozen=True)
class Sharding:
    """Over how many ranks a model is cut, bytes of a weight, and DeepSpeed's bounds."""

    ranks: int
    itemsize: int
    zero: ZeroSettings

    def shard(self, numel: int) -> int:
        """Elements of a parameter on each rank, padding with them."""
        return -(-numel // self.ranks)


@dataclass(frozen=True)
class Need:
    """Bytes on one rank at the moment at which they are most; `left`: that stay gathered after the pass, until the
    model's next one."""

    activations: int = 0
    gathered: int = 0
    gradients: int = 0
    left: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.gathered + self.gradients


@dataclass
class _Bucket:
    """Gradients that wait to be reduced, as DeepSpeed's stage 3 collects them: copied into a buffer that is always
    there, or kept as they are when they are larger; joined in a flat copy in fp32 when the buffer is full."""

    size: int
    itemsize: int
    elements: int = 0
    tensors: int = 0
    kept: int = 0  # bytes of gradients that lie outside of the buffer

    def add(self, numel: int) -> int:
        """Bytes of the reduction that this gradient sets off, 0 if none."""
        reduced = self.reduce() if self.elements and self.elements + numel > self.size else 0
        if self.elements + numel > self.size:
            self.kept += numel * self.itemsize
        self.elements += numel
        self.tensors += 1
        return reduced

    def reduce(self) -> int:
        """Bytes of reducing what is there, which is then gone."""
        wide = self.elements * 4 if self.kept and self.itemsize < 4 else 0
        needed = self.kept + wide + (0 if self.tensors <= 1 else self.elements * 4)
        self.elements = self.tensors = self.kept = 0
        return needed


def _window(timeline: Timeline, sharding: Sharding) -> Window | WholeWindow:
    if comes_whole(timeline.numel, sharding.zero):
        return WholeWindow(timeline.numel, sharding.ranks, sharding.itemsize, sharding.zero)
    sequence = [timeline.layers[e.value] for e in timeline.events if e.kind == "fetch"]
    return Window(sequence, timeline.forward, timeline.numel, sharding.ranks, sharding.itemsize, sharding.zero)


def need(timeline: Timeline, sharding: Sharding, trained: Timeline | None = None, adds_up: bool = False) -> Need:
    """Of one pass of the timeline's micro-batch. `trained`: the timeline of the model's training passes, for a forward
    pass alone of a model that trains, since DeepSpeed then expects the backward pass that does not come. `adds_up`:
    gradients go where they are added up at once (`engine.gradients`)."""
    window = _window(trained or timeline, sharding)
    live, bucket, most = 0, _Bucket(sharding.zero.reduce_bucket, sharding.itemsize), Need()

    def look(scratch: int = 0, gathered: int = 0, gradients: int = 0) -> None:
        nonlocal most
        here = Need(live + scratch, max(window.bytes, gathered), bucket.kept + gradients)
        most = here if here.total > most.total else most

    look(gathered=window.peak)
    for event in timeline.events:
        if event.kind == "live":
            live = event.value
            look()
        elif event.kind == "scratch":
            look(scratch=event.value)
        elif event.kind in ("keep", "drop"):
            (window.keep if event.kind == "keep" else window.drop)(event.value)
        elif event.kind == "gradient" and adds_up:
            look()
        elif event.kind == "gradient":
            reduced = bucket.add(timeline.numel[event.value])
            look(gradients=reduced - bucket.kept)  # a gradient that is kept is among what is live still
        else:
            window.peak = window.bytes
            (window.fetch if event.kind == "fetch" else window.release)(timeline.layers[event.value], event.value)
            look(gathered=window.peak)
    look(gradients=bucket.reduce())
    return replace(most, left=window.left)
