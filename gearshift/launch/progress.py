"""What rank 0 shows while a stage runs: a bar on a terminal, plain lines elsewhere (a log file, a pipe)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, TextIO

# Metric -> what to call it and how to write it; the first of each name that a step has is shown.
SHOWN: dict[str, tuple[str, str]] = {
    "objective/scores": ("reward", ".3f"),
    "objective/kl": ("kl", ".3f"),
    "loss/pretraining_heldout": ("text loss", ".3f"),
    "loss/train": ("loss", ".4f"),
    "loss/validation": ("validation", ".4f"),
    "reward/accuracy": ("accuracy", ".3f"),
    "throughput/tokens_per_second": ("tok/s", ".0f"),
}


class Progress:
    """`with Progress(250, "ppo") as bar: ... bar.update(metrics)`, once a step. Build it on rank 0 only."""

    def __init__(
        self,
        total: int,
        what: str,
        unit: str = "step",
        done: int = 0,
        file: TextIO | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`total` steps, of which `done` lie behind; plain lines come at most every `every` seconds."""
        self.total, self.what, self.unit, self.every, self.clock = total, what, unit, every, clock
        self.file = file or sys.stderr
        self.done = self._first = done
        self._start = self._last_line = clock()
        self._shown: dict[str, str] = {}
        self._bar: Any = None
        if self.file.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=what, unit=unit, file=self.file, dynamic_ncols=True)

    def update(self, metrics: Mapping[str, float]) -> None:
        """One step is done. A metric that this step lacks (validation) stays as it was last shown."""
        self.done += 1
        self._shown.update(shown(metrics))
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update(1)
            return
        now = self.clock()
        if now - self._last_line >= self.every or self.done in (self._first + 1, self.total):
            self._last_line = now
            print(self._line(now), file=self.file, flush=True)

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self.file)
        else:
            print(line, file=self.file, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _line(self, now: float) -> str:
        passed = now - self._start
        left = passed / (self.done - self._first) * (self.total - self.done)
        values = ", ".join(f"{name} {value}" for name, value in self._shown.items())
        return (
            f"{self.what}: {self.unit} {self.done}/{self.total}, {values}{', ' * bool(values)}{clock_time(left)} left"
        )


def shown(metrics: Mapping[str, float]) -> dict[str, str]:
    """The few metrics worth a place beside the bar: {"reward": "1.204", ...}."""
    return {name: f"{metrics[metric]:{form}}" for metric, (name, form) in SHOWN.items() if metric in metrics}


def clock_time(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
