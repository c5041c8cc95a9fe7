"""What a trace of `torch.profiler` says of each of its named ranges: time in operators, in collectives, in neither.

With a GPU the time is the GPU's: kernels and copies, NCCL's kernels, and neither (it waits for Python). Without one it
is that of the thread which opened the ranges: operators of torch and of Gearshift, collectives there and, where no
operator runs meanwhile, on gloo's threads, and neither (Python).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
# Of gearshift.engine.neighbours.
_SHARED = ("sum_over_ranks", "gather_ranks", "together", "put_part", "meet", "take_parts")
_COLLECTIVES = ("gloo:", "nccl:", "nccldevkernel", "ncclkernel", "c10d::", *(f"gearshift::{name}" for name in _SHARED))

Events = list[dict[str, Any]]


@dataclass(frozen=True)
class Operator:
    """`seconds`: without those of operators inside it."""

    name: str
    seconds: float
    calls: int


@dataclass(frozen=True)
class Range:
    """All ranges of one name together, in seconds; `operators`: those that began in it, the largest first."""

    name: str
    seconds: float
    computing: float
    collectives: float
    operators: tuple[Operator, ...]

    @property
    def idle(self) -> float:
        """Neither operators nor collectives."""
        return self.seconds - self.computing - self.collectives


def read_events(path: Path) -> Events:
    """What has a duration in a trace file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def ranges(events: Events, names: Sequence[str]) -> list[Range]:
    """Of each of the names that the trace has, in their order."""
    opened = [event for event in events if event.get("cat") == "user_annotation" and event["name"] in set(names)]
    if not opened:
        return []
    busy = _device(events) or _main_thread(events, opened[0]["tid"])
    found = []
    for name in names:
        windows = _spans(event for event in opened if event["name"] == name)
        if len(windows):
            found.append(_range(name, windows, busy))
    return found


@dataclass(frozen=True)
class _Busy:
    """`own`: operators with their self times, in order of their starts; the rest are times covered by them, by
    collectives that hold up the same thread, by collectives beside it."""

    own: list[tuple[float, float, str]]
    operators: np.ndarray
    holding: np.ndarray
    beside: np.ndarray


def _device(events: Events) -> _Busy | None:
    """Of the GPU, where the trace has one."""
    kernels = [event for event in events if event.get("cat") in _DEVICE]
    if not kernels:
        return None
    own = sorted((event["ts"], event["dur"], event["name"]) for event in kernels)
    nothing = np.zeros((0, 2))
    computing = _spans(event for event in kernels if not _is_collective(event["name"]))
    return _Busy(own, computing, nothing, _spans(event for event in kernels if _is_collective(event["name"])))


def _main_thread(events: Events, thread: Any) -> _Busy:
    operators = [event for event in events if event.get("cat") == "cpu_op" and event["tid"] == thread]
    computing = [event for event in operators if _is_operator(event["name"])]
    return _Busy(
        [own for own in _self_times(operators) if _is_operator(own[2]) or _is_collective(own[2])],
        _spans(computing),
        _spans(event for event in operators if _is_collective(event["name"])),
        _spans(event for event in events if event.get("cat") == "user_annotation" and _is_collective(event["name"])),
    )


def _is_collective(name: str) -> bool:
    return name.lower().startswith(_COLLECTIVES)


def _is_operator(name: str) -> bool:
    """Not the nodes of the backward pass, inside of which Python's hooks run too."""
    return "::" in name and not name.startswith(("autograd::", "torch::")) and not _is_collective(name)


def _self_times(operators: Events) -> list[tuple[float, float, str]]:
    """(start, self time, name) of one thread's operators, by their starts."""
    ordered = sorted(operators, key=lambda event: (event["ts"], -event["dur"]))
    own = [event["dur"] for event in ordered]
    around: list[int] = []
    for number, event in enumerate(ordered):
        while around and ordered[around[-1]]["ts"] + ordered[around[-1]]["dur"] <= event["ts"]:
            around.pop()
        if around:
            own[around[-1]] -= event["dur"]
        around.append(number)
    return [(event["ts"], max(0.0, each), event["name"]) for event, each in zip(ordered, own, strict=True)]


def _range(name: str, windows: np.ndarray, busy: _Busy) -> Range:
    def covered(*times: np.ndarray) -> float:
        return _within(_union(np.concatenate(times)), windows)

    # What holds up the thread counts as a collective even inside an operator; what is beside it, only where none runs.
    computing = covered(busy.operators, busy.holding) - covered(busy.holding)
    everything = covered(busy.operators, busy.holding, busy.beside)
    seconds = float((windows[:, 1] - windows[:, 0]).sum())
    return Range(name, seconds / 1e6, computing / 1e6, (everything - computing) / 1e6, _largest(windows, busy.own))


def _largest(windows: np.ndarray, own: list[tuple[float, float, str]]) -> tuple[Operator, ...]:
    starts = np.array([start for start, _, _ in own])
    sums: dict[str, list[float]] = {}
    for begin, end in windows:
        for _, seconds, name in own[np.searchsorted(starts, begin) : np.searchsorted(starts, end)]:
            of_name = sums.setdefault(name, [0.0, 0])
            of_name[0] += seconds
            of_name[1] += 1
    found = (Operator(name, seconds / 1e6, int(calls)) for name, (seconds, calls) in sums.items())
    return tuple(sorted(found, key=lambda operator: -operator.seconds))


def _spans(events: Iterable[dict[str, Any]]) -> np.ndarray:
    """[n, 2]: start and end in microseconds."""
    return np.array([(event["ts"], event["ts"] + event["dur"]) for event in events]).reshape(-1, 2)


def _union(times: np.ndarray) -> np.ndarray:
    """The same times [m, 2] in order, none of which overlap."""
    ordered = times[np.argsort(times[:, 0], kind="stable")]
    reached = np.maximum.accumulate(ordered[:, 1]) if len(ordered) else ordered[:, 1]
    first = np.ones(len(ordered), dtype=bool)
    first[1:] = ordered[1:, 0] > reached[:-1]
    last = np.roll(first, -1)
    return np.stack([ordered[first, 0], reached[last]], axis=1)


def _within(times: np.ndarray, windows: np.ndarray) -> float:
    """Of times that do not overlap, how much lies in the windows."""
    if not len(times):
        return 0.0
    lengths = times[:, 1] - times[:, 0]
    passed = np.stack([lengths.cumsum() - lengths, lengths.cumsum()], axis=1).ravel()
    until = np.interp(windows, times.ravel(), passed)
    return float((until[:, 1] - until[:, 0]).sum())
