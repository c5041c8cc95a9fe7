"""Config sections of a comparison: its systems, and how they are compared. No torch here."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from gearshift.engine.settings import RolloutSettings, Section, Sources


class SystemSettings(Section):
    """One model of a comparison."""

    init: str = Field(description="Hugging Face folder or hub name")
    prefix: str = Field("", description="Text put before every prompt (a few-shot prefix)")
    prefixes: list[str] = Field(
        [],
        description="Candidates for the prefix: the one with the best reward-model score on compare.selection is used",
    )
    temperature: float | None = Field(None, gt=0, description="In place of rollout.temperature for this system")
    top_k: int | None = Field(None, ge=0, description="In place of rollout.top_k; 0: all tokens")
    top_p: float | None = Field(None, gt=0, le=1, description="In place of rollout.top_p")
    max_new_tokens: int | None = Field(None, ge=1, description="In place of rollout.max_new_tokens")

    def rollout(self, common: RolloutSettings) -> RolloutSettings:
        """How this system writes: the common section with what the system says of its own."""
        own = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "max_new_tokens": self.max_new_tokens,
        }
        update: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
        if self.top_k == 0:
            update["top_k"] = None
        return common.model_copy(update=update)


class CompareSettings(Section):
    """How systems are compared."""

    prompts: int | None = Field(None, ge=1, description="Prompts answered, the first of data.validation; null: all")
    micro_batch_size: int = Field(8, ge=1, description="Rows per rank in one scoring forward; changes memory only")
    micro_batch_tokens: int | None = Field(
        None, ge=1, description="Tokens per rank in one forward, in place of micro_batch_size; null: by rows"
    )
    true_score: str | None = Field(
        None, description='Checker with known answers, "module:function" of (row, response) -> float; null: none'
    )
    against: str | None = Field(
        None, description="System that the others' answers are held against, a tie half a win; null: no win rates"
    )
    selection: Sources = Field(
        [], description="Sources of prompts that systems.NAME.prefixes are chosen on; none of data.validation"
    )
    selection_prompts: int | None = Field(None, ge=1, description="Of these, the first so many; null: all")
    resamples: int = Field(2000, ge=100, description="Bootstrap resamples behind each 95% interval")
