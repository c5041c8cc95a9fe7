"""The best model of a run by its validation, kept apart from the run's newest and from the rotation of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gearshift.engine import World


class BestModel:
    """RUN/best/: `model/`, and `best.json` with its step and score. Its state goes with a checkpoint."""

    def __init__(self, run_folder: Path):
        self.folder = run_folder / "best"
        self.step: int | None = None
        self.score: float | None = None

    def state(self) -> Any:
        """What a checkpoint holds of it."""
        return {"step": self.step, "score": self.score}

    def set_state(self, state: Any) -> None:
        self.step, self.score = state["step"], state["score"]

    def improves(self, score: float) -> bool:
        """Whether `score` is above all that were taken."""
        return self.score is None or score > self.score

    def take(self, step: int, score: float, world: World) -> None:
        """The model of `step` has been written to `folder`."""
        self.step, self.score = step, score
        if world.is_main:
            (self.folder / "best.json").write_text(json.dumps(self.state()) + "\n", encoding="utf-8")
