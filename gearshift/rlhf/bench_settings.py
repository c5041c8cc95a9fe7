"""The config section of `gearshift bench`. No torch here."""

from __future__ import annotations

from pydantic import Field

from gearshift.engine.settings import Section

# reward.init: no reward model of its own.
POLICY = "policy"


class BenchSettings(Section):
    """How often an iteration of PPO is timed, and where the figures go."""

    iterations: int = Field(3, ge=1, description="Timed iterations, of which medians and extremes are told")
    warmup: int = Field(1, ge=0, description="Iterations before them, in which memory is taken and steps are recorded")
    out: str | None = Field(None, description="JSON file for all figures, written by rank 0; null: none")
