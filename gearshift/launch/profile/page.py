"""profile.md: where each phase's time goes, and how that compares with what the machine can do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gearshift.engine.work import Work
from gearshift.launch.profile.peaks import Peaks
from gearshift.launch.profile.trace import Range

LARGEST = 5  # operators named of each phase


@dataclass(frozen=True)
class Facts:
    """`unit`: "iteration" or "step"; `before`: seconds of the one before, not profiled; 0: there was none."""

    command: str
    unit: str
    steps: Sequence[int]
    seconds: float
    before: float
    ranks: int
    device: str


def page(facts: Facts, found: Sequence[Range], work: Mapping[str, Sequence[Work]], peaks: Peaks) -> str:
    """`found`: the ranges of rank 0's trace, the step's own first."""
    step, *phases = found
    return "\n".join(
        [*_head(facts), *_times(step, phases), *_roofline(found, work, peaks), *_operators(step, phases), ""]
    )


def _head(facts: Facts) -> Iterator[str]:
    numbers = ", ".join(map(str, facts.steps))
    several = len(facts.steps) > 1
    yield f"# Profile of gearshift {facts.command}, {facts.unit}{'s' * several} {numbers}"
    yield ""
    ranks = "1 rank" if facts.ranks == 1 else f"{facts.ranks} ranks"
    yield f"Rank 0 of {ranks} on {facts.device}; every rank's trace is in `profile/` (ui.perfetto.dev opens it)."
    each = facts.seconds / len(facts.steps)
    compared = f"; the one before, without it, {facts.before:.3g} s" if facts.before else ""
    yield f"{'Each' if several else 'It'} took {each:.3g} s under the profiler{compared}."
    yield ""


def rest(step: Range, phases: Sequence[Range]) -> Range:
    """The part of a step that is in no phase."""
    top = [phase for phase in phases if "/" not in phase.name]
    return Range(
        "between phases",
        step.seconds - sum(phase.seconds for phase in top),
        step.computing - sum(phase.computing for phase in top),
        step.collectives - sum(phase.collectives for phase in top),
        (),
    )


def _times(step: Range, phases: Sequence[Range]) -> Iterator[str]:
    yield "## Where the time goes"
    yield "A phase holds those that are indented below it."
    yield ""
    yield "| phase | seconds | share | operators | collectives | Python, idle |"
    yield "|---|---|---|---|---|---|"
    for phase in [*phases, rest(step, phases), step]:
        parts = (phase.computing, phase.collectives, phase.idle)
        cells = [_indented(phase.name), f"{phase.seconds:.3f}", _share(phase.seconds, step.seconds)]
        yield _row([*cells, *(_share(part, phase.seconds) for part in parts)])
    yield ""


def _roofline(found: Sequence[Range], work: Mapping[str, Sequence[Work]], peaks: Peaks) -> Iterator[str]:
    yield "## Against the machine"
    yield (
        f"Measured on this rank while all measured at once, {peaks.threads} thread{'s' * (peaks.threads > 1)} each: "
        f"{peaks.flops / 1e9:,.1f} Gflop/s (a product of {peaks.product}), {peaks.bytes / 1e9:,.1f} GB/s (a copy, read "
        "and written). Useful work alone is counted (docs/performance.md). At least: seconds that it takes at these "
        "rates, and which of them bounds it; reached: their share of the phase."
    )
    yield ""
    yield "| phase | useful Gflop | useful GB | Gflop/s | GB/s | at least | bound by | reached |"
    yield "|---|---|---|---|---|---|---|---|"
    step, *phases = found
    for phase in [*phases, step]:
        if parts := work.get(phase.name):
            yield _row(_against(phase, parts, peaks))
    yield ""


def _against(phase: Range, parts: Sequence[Work], peaks: Peaks) -> list[str]:
    flops, size = sum(part.flops for part in parts), sum(part.bytes for part in parts)
    least = sum(part.seconds(peaks.flops, peaks.bytes) for part in parts)
    return [
        _indented(phase.name),
        f"{flops / 1e9:.3g}" if flops else "-",
        f"{size / 1e9:.3g}" if size else "-",
        f"{flops / phase.seconds / 1e9:.3g}" if flops else "-",
        f"{size / phase.seconds / 1e9:.3g}" if size else "-",
        f"{least:.3g} s",
        bound(parts, peaks),
        _share(least, phase.seconds),
    ]


def bound(parts: Sequence[Work], peaks: Peaks) -> str:
    """What most of the least time goes to."""
    seconds = {"flops": 0.0, "memory bandwidth": 0.0}
    for part in parts:
        by_flops = part.flops / peaks.flops >= part.bytes / peaks.bytes
        seconds["flops" if by_flops else "memory bandwidth"] += part.seconds(peaks.flops, peaks.bytes)
    return max(seconds, key=lambda name: seconds[name])


def _operators(step: Range, phases: Sequence[Range]) -> Iterator[str]:
    yield "## Largest operators"
    yield "By self time: seconds, share of the phase, calls."
    yield ""
    yield "| phase | operators |"
    yield "|---|---|"
    for phase in [*phases, step]:
        named = (
            f"`{operator.name[:60]}` {operator.seconds:.3f} s {_share(operator.seconds, phase.seconds)} "
            f"x {operator.calls:,}"
            for operator in phase.operators[:LARGEST]
        )
        yield _row([_indented(phase.name), ", ".join(named) or "-"])


def _indented(name: str) -> str:
    *above, own = name.split("/")
    return "&emsp;" * len(above) + own


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
