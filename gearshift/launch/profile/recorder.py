"""Records some steps of a run: a trace of every operation, the spans that it is in, and the work that these count."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _RecordFunctionFast

from gearshift.engine import World
from gearshift.engine.distributed import now
from gearshift.engine.work import Work
from gearshift.errors import UserError
from gearshift.kernels import native
from gearshift.launch.profile.peaks import Peaks, measure
from gearshift.rlhf.settings import ProfileSettings

FOLDER = "profile"


class Recorder:
    """Listens to spans. Records `settings.iterations` steps after `settings.after` that it lets go by, and then calls
    `finish(recorder)`, on every rank.

    `unit`: what a step is called, and the span around it. `came`: steps so far; `steps`: numbers of those recorded;
    `seconds`: of these together; `before`: of the one before them (0: there was none); `work`: by span ("train/policy")
    in the order in which they began; `peaks`: measured before the first.
    """

    def __init__(
        self,
        settings: ProfileSettings,
        unit: str,
        world: World,
        dtype: torch.dtype,
        finish: Callable[[Recorder], None],
    ):
        self.settings, self.unit, self.world = settings, unit, world
        self.peaks: Peaks | None = None
        self.work: dict[str, list[Work]] = {}
        self.steps: list[int] = []
        self.seconds = self.before = 0.0
        self.came = 0
        self._dtype, self._finish = dtype, finish
        self._path: list[str] = []
        self._profiler: Any = None

    @property
    def counting(self) -> bool:
        return bool(self._path)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        self.came += 1
        ahead = self.settings.after - self.came + 1
        if ahead > 0 or len(self.steps) == self.settings.iterations:
            start = now(self.world.device)
            yield
            self.before = now(self.world.device) - start if ahead == 1 else self.before
            return
        if self._profiler is None:
            self.peaks = measure(self.world, self._dtype)
            self._profiler = _profiler(self.world.device)
            self._profiler.start()
        start = now(self.world.device)
        # The profiler takes what these open for an operator: the compiled library's functions are none of torch's.
        with native.surrounded(_RecordFunctionFast), self._range(self.unit):
            yield
        self.seconds += now(self.world.device) - start
        self.steps.append(number)
        if len(self.steps) == self.settings.iterations:
            self._finish(self)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        if not self._path:  # between steps nothing is recorded
            yield
            return
        with self._range(name):
            yield

    def count(self, work: Work) -> None:
        for depth in range(len(self._path)):
            self.work[self._name(depth)].append(work)

    def write_trace(self, folder: Path) -> Path:
        """`folder`/profile/rankN.json.gz. Raises UserError."""
        path = folder / FOLDER / f"rank{self.world.rank}.json.gz"
        aside = path.with_name(f".writing-{path.name}")
        self._profiler.stop()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(aside))
            os.replace(aside, path)
        except OSError as error:
            raise UserError(f"run.profile: {path} cannot be written: {error.strerror}") from None
        self._profiler = None  # and with it all events
        return path

    @contextmanager
    def _range(self, name: str) -> Iterator[None]:
        """A range of the trace. The device is waited for, so that what runs on it falls into its own range."""
        self._path.append(name)
        full = self._name(len(self._path) - 1)
        self.work.setdefault(full, [])
        now(self.world.device)
        try:
            with torch.profiler.record_function(full):
                yield
                now(self.world.device)
        finally:
            self._path.pop()

    def _name(self, depth: int) -> str:
        """Of the span that is so deep: "train/policy"; at depth 0 the step's own."""
        return "/".join(self._path[1 : depth + 1]) or self.unit


def _profiler(device: torch.device) -> Any:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)
