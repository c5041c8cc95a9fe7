"""The config section of checkpoints. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gearshift.engine.settings import Section

FOLDER = "checkpoints"


class CheckpointSettings(Section):
    """When the whole state of a run is saved, how much of it stays, and where a run goes on from."""

    every: int = Field(500, ge=0, description="Optimizer steps (ppo: iterations) between checkpoints; 0: none")
    keep: int = Field(2, ge=1, description="Newest checkpoints that stay, besides the one of the best validation")
    background: bool = Field(
        False,
        description="Write while the run goes on: it waits for a copy in host memory alone (as large as the files)",
    )
    resume: str | None = Field(
        None,
        description="auto: go on from the newest whole checkpoint in run.folder; a path: from that one; never: start "
        "again, its checkpoints removed; null: start where there are none (--resume says the same)",
    )
    damaged: Literal["older", "refuse"] = Field(
        "older", description="resume: auto, and the newest checkpoint is damaged: use the one before, or stop"
    )

    @property
    def resumes(self) -> bool:
        """Whether the run goes on from a checkpoint."""
        return self.resume not in (None, "never")


class PpoCheckpointSettings(CheckpointSettings):
    """The same, an iteration being many optimizer steps."""

    every: int = Field(20, ge=0, description="Iterations between checkpoints; 0: none")
