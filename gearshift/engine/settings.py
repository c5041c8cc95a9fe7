"""Config sections that the engine reads. No torch here: the command line must be able to load them in a blink."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

Dtype = Literal["fp32", "bf16"]


class Section(BaseModel):
    """A config section: no unknown keys, no silent conversions (a quoted number is not a number), frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _refuse_bad_betas(betas: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= beta < 1 for beta in betas):
        raise PydanticCustomError("betas", "should be two numbers from 0 to below 1")
    return betas


class OptimizerSettings(Section):
    """Adam by default, with InstructGPT's betas (appendix C: 0.9, 0.95)."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="Update rule; sgd is plain, without momentum")
    learning_rate: float = Field(
        1e-5,
        gt=0,
        description="Peak rate per optimizer step; in ppo the policy's (InstructGPT C.4 swept 2.55e-6 to 2.55e-5)",
    )
    betas: Annotated[tuple[float, float], AfterValidator(_refuse_bad_betas)] = Field(
        (0.9, 0.95), strict=False, description="AdamW: decay of the two moments, 0 to below 1 each (InstructGPT C)"
    )
    eps: float = Field(1e-8, gt=0, description="AdamW: added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0, description="AdamW: decoupled decay, per step and unit of learning rate")
    max_grad_norm: float = Field(1.0, ge=0, description="Global gradient norm above which gradients are scaled; 0: off")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _refuse_empty_text(texts: list[str]) -> list[str]:
    if not all(texts):
        raise PydanticCustomError("empty", "should hold no empty text, which would end every response at once")
    return texts


class RolloutSettings(Section):
    """How the policy writes: tensor parallelism, sampling, and the bounds of the shift."""

    tp_size: int = Field(1, ge=1, description="Ranks that share one copy of the policy during rollouts")
    max_new_tokens: int = Field(1024, ge=1, description="Longest response, tokens (InstructGPT C: 1k)")
    temperature: float = Field(1.0, gt=0, description="Softmax temperature of every policy log-prob (InstructGPT C.4)")
    top_k: int | None = Field(None, ge=1, description="Draw from the k most probable tokens; null: all")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Draw from the fewest most probable tokens (of top_k) with this part of the probability; 1: all",
    )
    stop: Annotated[list[str], BeforeValidator(_as_list), AfterValidator(_refuse_empty_text)] = Field(
        [], description="Texts that end a response, as EOS does, once its text holds one; they stay in it"
    )
    slots: int | None = Field(
        None, ge=1, description="Rows decoded at once per tensor-parallel group; null: all rows that it is given"
    )
    bucket_mb: int = Field(64, ge=1, description="Most that one exchange of the shift moves per rank, MiB")
    logprob_gap_limit: float | None = Field(
        None,
        gt=0,
        description="Stop when rollout/logprob_gap (rollout against training forward, nats) is larger; "
        "null: 1e-3 in fp32, 0.1 in bf16",
    )

    def gap_limit(self, dtype: Dtype) -> float:
        """The bound on `rollout/logprob_gap` in nats, the default included."""
        if self.logprob_gap_limit is not None:
            return self.logprob_gap_limit
        # Rounding grows with a model's logits, so this leaves room above the 1e-5 of models with small ones. What is
        # wrong (a mask, a position, stale weights) is off by far more.
        return 1e-3 if dtype == "fp32" else 0.1


# DeepSpeed's own keys that would contradict a setting of Gearshift, and where to say it instead.
OWNED_BY_GEARSHIFT = {
    "train_batch_size": "set ppo.batch_size or train.batch_size instead",
    "train_micro_batch_size_per_gpu": "set ppo.micro_batch_size or train.micro_batch_size instead",
    "gradient_accumulation_steps": "it follows from the batch sizes: set micro_batch_size instead",
    "gradient_clipping": "set optimizer.max_grad_norm instead",
    "zero_optimization.stage": "Gearshift shards with stage 3 only",
    "optimizer": "set the optimizer section instead",
    "scheduler": "set train.schedule or ppo.warmup_iterations instead",
    "bf16": "set run.dtype instead",
    "fp16": "fp16 is not supported: set run.dtype to bf16 or fp32 instead",
    "amp": "set run.dtype instead",
    "torch_autocast": "set run.dtype instead",
    "communication_data_type": "gradients always travel in fp32",
    "data_types": "gradients always accumulate in fp32",
}


def _refuse_owned_keys(config: dict[str, Any]) -> dict[str, Any]:
    for key, instead in OWNED_BY_GEARSHIFT.items():
        inner: Any = config
        for part in key.split("."):
            inner = inner.get(part) if isinstance(inner, dict) else None
        if inner is not None:
            raise PydanticCustomError("owned", "{text}", {"field": key, "text": f"this key is Gearshift's: {instead}"})
    return config


# Merged verbatim into DeepSpeed's own config.
DeepSpeedConfig = Annotated[
    dict[str, Any],
    AfterValidator(_refuse_owned_keys),
    Field(description="Merged verbatim into DeepSpeed's config (offloading, buckets, logging ...)"),
]


# One source or a list of them: a local .jsonl, .jsonl.gz, .parquet or .txt file, or a hub data set.
Sources = Annotated[list[str], BeforeValidator(_as_list)]
