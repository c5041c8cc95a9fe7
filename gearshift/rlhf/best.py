"""The model with the best validation so far, kept apart from the newest one: RUN/best/model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gearshift.engine import World
from gearshift.engine.checkpoints import files
from gearshift.rlhf.reporting import Report

FOLDER = "best"


class Best:
    """A part of a run that a checkpoint holds: which step's model is in RUN/best, and its score (higher is better).

    `save(folder)` writes the model under RUN/best, as a folder that `from_pretrained` loads. Collective.
    """

    def __init__(self, run_folder: str, world: World, report: Report, save: Callable[[str], None], *, resumes: bool):
        """Unless the run `resumes` one, an earlier run's best model goes: it is not this one's. Collective."""
        self.folder, self.world, self.report, self._save = Path(run_folder) / FOLDER, world, report, save
        self.step: int | None = None
        self.score = float("-inf")
        with world.main_first():
            if world.is_main and not resumes and (self.folder / "best.json").exists():
                shutil.rmtree(self.folder)

    def offer(self, step: int, score: float) -> bool:
        """Keep the model as it is after `step`, if no earlier one had such a score. Collective."""
        if not score > self.score:
            return False
        self.step, self.score = step, score
        told = self.folder / "best.json"
        with self.world.main_first():
            if self.world.is_main:
                told.unlink(missing_ok=True)  # a run that is killed in between leaves a model that nothing is said of
        self._save(str(self.folder))
        with self.world.main_first():
            if self.world.is_main:
                files.replace_text(told, json.dumps(self.state()) + "\n")
        return True

    def state(self) -> Any:
        return {"step": self.step, "score": self.score if self.step is not None else None}

    def set_state(self, state: Any) -> None:
        """As `state` gave it.

        Where RUN/best holds another model, the best one is looked for anew: in another folder, where there is none; or
        when the run was ended after a later step had done better, which will be taken again.
        """
        if state["step"] is None:
            return
        if self._kept() != state:
            self.report.say(f"best         the model of step {state['step']} is not in {self.folder}: looked for anew")
            return
        self.step, self.score = state["step"], state["score"]

    def _kept(self) -> Any:
        """The state that best.json was written with, the same on every rank; None where there is none."""
        try:
            return json.loads((self.folder / "best.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none, or a half written one
            return None
