"""The runs that `plan_memory.py` measures: random models, prompts and texts in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gearshift.rlhf.settings import PpoConfig


@dataclass(frozen=True)
class Size:
    """A policy, a reward model (None: of the policy's shape), and the settings that memory depends on."""

    policy: dict[str, Any]
    prompt: int
    response: int
    reward: dict[str, Any] | None = None
    ppo: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)
    ptx: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    dtype: str = "fp32"

    def config(self, folder: Path) -> PpoConfig:
        zero = {"reduce_bucket_size": 1_000_000, **self.zero}
        return PpoConfig.model_validate(
            {
                "run": {"folder": str(folder / "run"), "dtype": self.dtype, "hang_seconds": 0},
                "policy": {"init": str(folder / "policy"), "lora": self.lora},
                "reward": {"init": str(folder / "reward")},
                "data": {"train": str(folder / "prompts.jsonl"), "max_prompt_tokens": self.prompt},
                "rollout": {"max_new_tokens": self.response, "record_steps": False, **self.rollout},
                "ppo": {"batch_size": 16, "minibatches": 2, "micro_batch_size": 4, "samples_every": 0, **self.ppo},
                "ptx": {"data": str(folder / "text.jsonl"), "max_tokens": 64, "examples_per_episode": 1, **self.ptx},
                "optimizer": self.optimizer,
                "deepspeed": {"zero_optimization": zero},
            }
        )


def llama(
    hidden: int, layers: int, heads: int, kv_heads: int, vocabulary: int, wide: int | None = None
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": wide or hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }


CALIBRATED = {
    "llama-6M": Size(llama(256, 4, 8, 8, 4096), prompt=32, response=32, rollout={"tp_size": 2}),
    "llama-20M": Size(
        llama(512, 4, 8, 4, 8192),
        prompt=24,
        response=40,
        reward=llama(256, 4, 8, 8, 8192),
        zero={"stage3_param_persistence_threshold": 1000, "stage3_max_reuse_distance": 2_000_000,
              "stage3_prefetch_bucket_size": 1_000_000, "reduce_bucket_size": 8_000_000},
    ),
}  # fmt: skip
CHECKED = {
    "qwen3-12M": Size(
        {**llama(320, 5, 10, 2, 6000), "model_type": "qwen3", "head_dim": 32},
        prompt=48,
        response=24,
        reward={**llama(192, 3, 6, 6, 6000), "model_type": "qwen3", "head_dim": 32},
        ppo={"micro_batch_size": 8},
        rollout={"slots": 3},
        zero={"reduce_bucket_size": 2_500_000},
    ),
    "opt-15M-bf16": Size(
        {"model_type": "opt", "hidden_size": 384, "word_embed_proj_dim": 384, "ffn_dim": 1536, "num_hidden_layers": 6,
         "num_attention_heads": 6, "vocab_size": 5000, "max_position_embeddings": 512, "tie_word_embeddings": False},
        prompt=64,
        response=32,
        ppo={"batch_size": 24, "micro_batch_size": 3, "ema": None},
        rollout={"tp_size": 2, "keep_weights": False},
        ptx={"max_tokens": 100},
        zero={"reduce_bucket_size": 3_000_000, "stage3_param_persistence_threshold": 10_000,
              "stage3_prefetch_bucket_size": 500_000},
        dtype="bf16",
    ),
    "llama-45M": Size(
        llama(640, 7, 10, 5, 8192),
        prompt=100,
        response=28,
        ppo={"batch_size": 8, "micro_batch_size": 2},
        rollout={"tp_size": 1},
        zero={"reduce_bucket_size": 6_000_000},
    ),
    "llama-lora-20M": Size(
        llama(512, 4, 8, 8, 8192), prompt=40, response=40, rollout={"tp_size": 2}, lora={"rank": 8},
    ),
    "llama-again-14M": Size(
        llama(320, 9, 10, 2, 6000),
        prompt=120,
        response=60,
        ppo={"micro_batch_size": 8},
        ptx={"max_tokens": 160},
        rollout={"tp_size": 2},
        zero={"stage3_max_reuse_distance": 2_000_000, "stage3_prefetch_bucket_size": 1_000_000,
              "reduce_bucket_size": 3_000_000},
        optimizer={"gradient_checkpointing": True},
    ),
}  # fmt: skip


class Quiet:
    """A report that tells nobody."""

    def start(self, lines: Sequence[str], total: int, done: int = 0) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def left_out(self, field: str, rows: Mapping[str, Sequence[str]]) -> None: ...

    def say(self, line: str) -> None: ...


def make_run(size: Size, folder: Path) -> None:
    """Models and data. Every byte is a token, so that prompts have exactly `size.prompt` of them; an answer ends by
    chance only."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from gearshift.rlhf.data.tokenizers import SMALLEST_VOCABULARY, train_tokenizer

    tokenizer = train_tokenizer(["a"], SMALLEST_VOCABULARY)
    special = {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None}
    for name, shape, kind, more in (
        ("policy", size.policy, AutoModelForCausalLM, {}),
        ("reward", size.reward or size.policy, AutoModelForSequenceClassification, {"num_labels": 1}),
    ):
        fields = {k: v for k, v in shape.items() if k != "model_type"}
        config = AutoConfig.for_model(shape["model_type"], **fields, **special, **more)
        kind.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompts = [{"prompt": f"{i:04d}".ljust(size.prompt, "x")} for i in range(64)]
    _write(folder / "prompts.jsonl", prompts)
    _write(folder / "text.jsonl", [{"text": f"{i:04d}" * 200} for i in range(32)])


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
