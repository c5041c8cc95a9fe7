"""Saving a run as it goes, and going on from where it was: what a checkpoint holds besides DeepSpeed's files."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from gearshift.engine import World, watchdog
from gearshift.engine.checkpoints.manifest import Manifest
from gearshift.engine.checkpoints.settings import FOLDER
from gearshift.engine.checkpoints.writing import Checkpoints, versions
from gearshift.engine.saving import small_files
from gearshift.engine.zero import ZeroModel
from gearshift.errors import EveryRank, Paused, UserError
from gearshift.rlhf.differences import command_of, require_same_run, what_differs
from gearshift.rlhf.reporting import Report
from gearshift.rlhf.settings import PpoConfig, PretrainConfig
from gearshift.rlhf.signals import StopSignals


class Stateful(Protocol):
    """A part of a run that is no tensor: a data cursor, a controller. Its state is JSON, the same on every rank."""

    def state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class Saver:
    """Saves a run every `checkpoint.every` steps; with `checkpoint.resume` it is brought back here, at once.

    `models`: what trains, by name; `parts`: the rest that a step changes. `done`: steps that the run has behind it.
    """

    def __init__(
        self,
        config: PretrainConfig | PpoConfig,
        world: World,
        report: Report,
        models: Mapping[str, ZeroModel],
        parts: Mapping[str, Stateful],
        tokenizer: Any,
    ):
        self.config, self.world, self.report = config, world, report
        self.models, self.parts, self.tokenizer = models, parts, tokenizer
        self._small_files: dict[str, bytes] = {}
        settings = config.checkpoint
        self.checkpoints = Checkpoints(
            Path(config.run.folder) / FOLDER, world, settings.keep, background=settings.background
        )
        self.done = self._resume() if settings.resumes else self._start()
        self._signals = StopSignals(Path(config.run.folder)) if settings.every else None

    def after(self, step: int, score: float | None = None) -> None:
        """Step `step` is done; `score` of its validation, the higher the better, where there was one. Collective.

        Raises Paused, the run being saved, when a signal has asked for it.
        """
        every = self.config.checkpoint.every
        self.checkpoints.poll()
        if problem := self.checkpoints.not_removed():
            self.report.say(f"checkpoints  {problem}: tried again after the next save")
        came = self._signals.on_any_rank(self.world) if self._signals else 0
        if every and (came or step % every == 0):
            self.save(step, score)
        if came:
            with watchdog.phase("saving"):
                self.checkpoints.close()
            raise Paused(f"saved after step {step} at {signal.Signals(came).name}: go on with --resume auto")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around all steps: an error that every rank raises leaves what was saved before it."""
        try:
            yield
        except EveryRank:
            self.checkpoints.close()
            raise

    def close(self) -> None:
        """Nothing more is saved: the run is at its end. Collective."""
        with watchdog.phase("saving"):
            self.checkpoints.close()
        if self._signals:
            self._signals.close()

    def save(self, step: int, score: float | None = None) -> None:
        """One checkpoint now. Collective. Raises UserError, on every rank, when the disk refuses."""
        manifest = Manifest(
            command=command_of(self.config),
            step=step,
            world_size=self.world.size,
            tp_size=self.config.rollout.tp_size if isinstance(self.config, PpoConfig) else 1,
            config=self.config.model_dump(mode="json"),
            state={name: part.state() for name, part in self.parts.items()},
            versions=versions(),
            score=score,
        )
        if self.world.is_main and not self._small_files:
            self._small_files = {
                f"{name}/{file}": content
                for name, model in self.models.items()
                for file, content in small_files(model.module, self.tokenizer).items()
            }
        with watchdog.phase(f"saving step {step}"):
            self.checkpoints.save(manifest, self.models, self._small_files)

    def _start(self) -> int:
        # Only where that was asked for: other folders with checkpoints in them are refused before processes start.
        self.checkpoints.clear()
        return 0

    def _resume(self) -> int:
        step = self._chosen()
        manifest = Manifest.read(step)
        require_same_run(manifest, self.config)
        self.report.say(f"resume       {step}: {manifest.step} steps done")
        for line in what_differs(manifest, self.config, versions(), self.world.size):
            self.report.say(f"resume       {line}")
        self.checkpoints.load(step, self.models)
        for name, part in self.parts.items():
            if name in manifest.state:
                part.set_state(manifest.state[name])
        self.checkpoints.go_on_from(step)
        return manifest.step

    def _chosen(self) -> Path:
        """The step's folder; what is damaged is reported by file name."""
        settings = self.config.checkpoint
        if settings.resume == "auto":
            step, wrong = self.checkpoints.newest(refuse_damaged=settings.damaged == "refuse")
            for problem in wrong:
                self.report.say(f"resume       {problem}")
            return step
        step = Path(str(settings.resume))
        wrong = self.checkpoints.problems(step)
        if wrong:
            raise UserError(wrong[0])
        return step
