"""Config sections that the engine reads. No torch here: the command line must be able to load them in a blink."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from gearshift.errors import SettingError

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
    gradient_checkpointing: bool = Field(
        False,
        description="Keep the inputs of layers alone, and compute their activations again in the backward pass: less "
        "memory, about a third more work; in ppo policy and critic",
    )


class LoraSettings(Section):
    """Adapters of low rank beside a frozen model (Hu et al. 2021, arXiv 2106.09685), by the peft library."""

    rank: int = Field(16, ge=1, description="Rank of the adapters")
    alpha: float = Field(32.0, gt=0, description="An adapter's product is multiplied by alpha / rank")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description='Layers with an adapter, by the last part of their name; "all-linear": every Linear but the head',
    )


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
    bucket_mb: int = Field(
        64, ge=1, description="Most that a rank sends or receives in one exchange of the shift, MiB; four such buffers"
    )
    keep_weights: bool = Field(
        True, description="Rollout weights stay in memory between rollouts; false: freed, and allocated anew each time"
    )
    attention: Literal["sdpa", "flash"] = Field(
        "sdpa", description="Attention of decoding; flash: by flash-attn, which has to be installed, on a GPU in bf16"
    )
    record_steps: bool = Field(
        True,
        description="Steps of decoding are recorded and done again without Python (CUDA graphs on a GPU); with "
        "keep_weights recordings stay between rollouts, and so does the cache of keys and values, up to 4 GiB",
    )
    offload_optimizer: bool = Field(
        False,
        description="Optimizer state (fp32 weights, their average, moments) moves to host memory during rollouts",
    )
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


def check_shift(deepspeed: dict[str, Any], offload_optimizer: bool) -> None:
    """Raises SettingError for a `deepspeed:` section under which shards are not what the plan of a shift takes them to
    be, or optimizer state cannot move as `rollout.offload_optimizer` says."""
    zero = _section(deepspeed, "zero_optimization")
    for key, refused, why in (
        (
            "zero_hpz_partition_size",
            zero.get("zero_hpz_partition_size") not in (None, 0, 1),
            "a second partition (hpZ)",
        ),
        (
            "mics_shard_size",
            zero.get("mics_shard_size") not in (None, -1, 0),
            "weights cut over some ranks only (MiCS)",
        ),
        # Training would see rounded weights, and rollouts the exact ones.
        ("zero_quantized_weights", zero.get("zero_quantized_weights"), "quantized weights"),
        ("zero_quantized_nontrainable_weights", zero.get("zero_quantized_nontrainable_weights"), "quantized weights"),
        ("offload_param", _section(zero, "offload_param").get("device") == "nvme", "weights on NVMe (use device: cpu)"),
    ):
        if refused:
            raise SettingError(f"deepspeed.zero_optimization.{key}", f"rollouts do not support {why}: leave it out")
    if offload_optimizer and _section(zero, "offload_optimizer").get("device", "none") != "none":
        raise SettingError(
            "rollout.offload_optimizer",
            "deepspeed.zero_optimization.offload_optimizer keeps the optimizer's state on the host at all times: "
            "leave out one of the two",
        )


def check_attention_setting(attention: str, dtype: Dtype | None) -> None:
    """Raises SettingError where `rollout.attention` cannot be had. `dtype`: None where it is not known yet."""
    if attention != "flash":
        return
    if dtype == "fp32":
        raise SettingError("rollout.attention", "flash-attn knows no fp32: set run.dtype to bf16, or use sdpa")
    if importlib.util.find_spec("flash_attn") is None:
        raise SettingError("rollout.attention", 'flash needs flash-attn: pip install "gearshift[flash]", or use sdpa')
    try:
        found = importlib.metadata.version("flash_attn")
    except importlib.metadata.PackageNotFoundError:  # on the path, not installed: nobody says which one it is
        return
    if tuple(map(int, found.split(".")[:2])) < (2, 6):
        raise SettingError("rollout.attention", f"flash needs flash-attn 2.6 or newer, not {found}, or use sdpa")


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    """Empty where it is not there, or no section: DeepSpeed's own to say."""
    found = config.get(key)
    return found if isinstance(found, dict) else {}


# Merged verbatim into DeepSpeed's own config.
DeepSpeedConfig = Annotated[
    dict[str, Any],
    AfterValidator(_refuse_owned_keys),
    Field(description="Merged verbatim into DeepSpeed's config (offloading, buckets, logging ...)"),
]


# One source or a list of them: a local .jsonl, .jsonl.gz, .parquet or .txt file, or a hub data set.
Sources = Annotated[list[str], BeforeValidator(_as_list)]
