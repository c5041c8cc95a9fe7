"""The config section `train` of each supervised stage. No torch here.

Numbers are InstructGPT's (arXiv 2203.02155, appendix C) where it gives them; "C.1" below is its section.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gearshift.engine.settings import Section, Sources


class TrainSettings(Section):
    """Epochs, batches and the rate's schedule of a supervised stage."""

    epochs: int = Field(
        1, ge=1, description="Passes over the training rows (InstructGPT: SFT 16, before PPO 2, reward 1)"
    )
    batch_size: int = Field(
        32,
        ge=1,
        description="Sequences (reward: prompts, or pairs) per optimizer step, all ranks together (InstructGPT C.1)",
    )
    micro_batch_size: int = Field(
        8,
        ge=1,
        description="Rows (reward: prompts, or pairs) per rank in one forward and backward (twice as many where "
        "validating); changes memory alone (and with train.residual_dropout what is dropped)",
    )
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens per rank in one forward and backward, in place of micro_batch_size; null: by rows",
    )
    schedule: Literal["constant", "cosine"] = Field("cosine", description="Learning rate after warm-up")
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps of linear warm-up (InstructGPT C.1: none)")
    final_fraction: float = Field(
        0.1, ge=0, le=1, description="cosine: last rate as a part of the peak (InstructGPT C.1)"
    )
    validate_every: int = Field(0, ge=0, description="Optimizer steps between validations; 0: only at the end")


class SftTrainSettings(TrainSettings):
    """And what is SFT's alone."""

    pretraining_fraction: float = Field(
        0.0, ge=0, lt=1, description="Part of the rows that is pretraining text (InstructGPT C.3: 0.1 before PPO)"
    )
    pretraining: Sources = Field([], description="Sources of that text")

    residual_dropout: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="Share dropped of what each attention and feed-forward block puts out, in training steps alone "
        "(InstructGPT C.1: 0.2); 0: none",
    )
    best: Literal["loss", "score"] = Field(
        "loss",
        description="What chooses best/model among the validations: the lowest loss, or the highest mean score by "
        "reward.init of answers to the prompts of data.validation (InstructGPT C.1: the score)",
    )


class RewardTrainSettings(TrainSettings):
    """And what is the reward model's alone."""

    pairs: Literal["kwise", "pairwise"] = Field(
        "kwise",
        description="kwise: a prompt with all its pairs is one row, each answer encoded once (InstructGPT 3.5); "
        "pairwise: each pair is a row of its own, shuffled with all others, its two answers encoded again",
    )
