"""A stage's report: metrics and samples to files and trackers, a bar and lines to the screen; on rank 0 only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from gearshift.launch.arithmetic import batch_arithmetic
from gearshift.launch.profile import profiled
from gearshift.launch.progress import Progress
from gearshift.launch.tracking import Tracker
from gearshift.rlhf.reporting import Report
from gearshift.rlhf.settings import Config


class _Silent:
    """The report of every rank but the first."""

    def start(self, lines: Sequence[str], total: int, done: int = 0) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def left_out(self, field: str, rows: Mapping[str, Sequence[str]]) -> None: ...

    def say(self, line: str) -> None: ...


class _Told:
    """Rank 0's report."""

    def __init__(self, command: str, config: Config, tracker: Tracker):
        self._command, self._config, self._tracker = command, config, tracker
        self._progress: Progress | None = None

    def start(self, lines: Sequence[str], total: int, done: int = 0) -> None:
        self._tracker.keep_until(done)
        for line in _start_lines(lines, self._config, total):
            self.say(line)
        unit = "iteration" if self._command == "ppo" else "step"
        self._progress = Progress(total, self._command, unit=unit, done=done)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._tracker.log(step, metrics)
        if self._progress is not None:
            self._progress.update(metrics)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._tracker.samples(step, rows)

    def left_out(self, field: str, rows: Mapping[str, Sequence[str]]) -> None:
        self._tracker.left_out(field, rows)

    def say(self, line: str) -> None:
        if self._progress is not None:
            self._progress.say(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()


class Spoken(_Silent):
    """The report of a command that keeps nothing: rank 0's lines on the screen."""

    def __init__(self, config: Config):
        self._config = config

    def start(self, lines: Sequence[str], total: int, done: int = 0) -> None:
        for line in _start_lines(lines, self._config, total):
            self.say(line)

    def say(self, line: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(line, file=sys.stderr, flush=True)


def _start_lines(lines: Sequence[str], config: Config, total: int) -> list[str]:
    return [*lines, *batch_arithmetic(config, int(os.environ["WORLD_SIZE"]), total)]


@contextmanager
def reporter(command: str, config: Config) -> Iterator[Report]:
    """The report of this rank while the stage runs."""
    if os.environ.get("RANK", "0") != "0":
        yield _Silent()
        return
    tracking = getattr(config, "tracking", None)
    with Tracker(config.run.folder, tracking.trackers if tracking else [], config) as tracker:
        report = _Told(command, config, tracker)
        try:
            yield report
        finally:
            report.close()


def run_stage(command: str, stage: Callable[[Any, Report], None], config: Config) -> None:
    """`stage(config, report)` in this rank."""
    with reporter(command, config) as report, profiled(command, config, report):
        stage(config, report)
