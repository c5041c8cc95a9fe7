"""What a stage tells while it runs. The launch floor writes it to files, trackers and the screen."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from gearshift.engine import watchdog
from gearshift.engine.spans import span


class Report(Protocol):
    """Called on every rank; only rank 0's goes anywhere."""

    def start(self, lines: Sequence[str], total: int, done: int = 0) -> None:
        """Say what is about to happen, and how many steps it takes, `done` of which were taken before a resume."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one finished step."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Some answers, as `{"prompt", "response", ...}`."""

    def left_out(self, field: str, rows: Mapping[str, Sequence[str]]) -> None:
        """Rows of the sources in the config's `field` that are not used: reason -> where each stands."""

    def say(self, line: str) -> None:
        """One line for the screen."""


class Phases:
    """Seconds spent in each named phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with watchdog.phase(name), span(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def total(self) -> float:
        """Seconds since this object was made."""
        return time.perf_counter() - self._start
