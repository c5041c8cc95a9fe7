"""From config sections to what the stages work with: ranks, tokenizers, rows, models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from gearshift.engine import CausalModel, Sampling, StopStrings, Training, World
from gearshift.engine.loading import config_of
from gearshift.engine.saving import save_adapters
from gearshift.engine.settings import OptimizerSettings, RolloutSettings
from gearshift.engine.zero import ALONE, on_host
from gearshift.errors import SettingError, UserError
from gearshift.rlhf.agreement import read_alike
from gearshift.rlhf.data.encoding import Block, Encoder
from gearshift.rlhf.data.left_out import Encoded
from gearshift.rlhf.data.sources import Record, read_sources
from gearshift.rlhf.data.tokenizers import load_tokenizer, load_vocabulary
from gearshift.rlhf.data.vocabulary import has_tokenizer, rows_needed, too_small
from gearshift.rlhf.reporting import Report
from gearshift.rlhf.schedules import constant, cosine
from gearshift.rlhf.settings import DataSettings, PolicySettings, RunSettings, TrainSettings, names_function

Row = TypeVar("Row")


def dtype_of(run: RunSettings, world: World) -> torch.dtype:
    """`run.dtype`; where it is not said, bf16 on a GPU and fp32 on a CPU (bf16 products are slower there)."""
    name = run.dtype or ("fp32" if world.device.type == "cpu" else "bf16")
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def training_of(
    optimizer: OptimizerSettings,
    schedule: Callable[[int], float],
    rate: float | None = None,
    average: float | None = None,
) -> Training:
    """How a model's weights move; `rate` in place of the section's; `average`: decay of their moving average."""
    return Training(
        learning_rate=optimizer.learning_rate if rate is None else rate,
        optimizer=optimizer.name,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        schedule=schedule,
        average=average,
        gradient_checkpointing=optimizer.gradient_checkpointing,
    )


def save_policy(model: CausalModel, run_folder: str, policy: PolicySettings, tokenizer: Any) -> None:
    """The run's `model/`, and with LoRA its `adapter/` beside it. Collective."""
    model.save_pretrained(f"{run_folder}/model", tokenizer)
    if policy.lora is not None:
        save_adapters(model.module, Path(run_folder) / "adapter", model.world, policy.init)


def schedule_of(train: TrainSettings, steps: int) -> Callable[[int], float]:
    if train.schedule == "cosine":
        return cosine(steps, train.warmup_steps, train.final_fraction)
    return constant(train.warmup_steps)


def encoder_of(data: DataSettings, tokenizer: Any, max_tokens: int | None = None) -> Encoder:
    """`max_tokens` in place of the section's (pretraining text has its own)."""
    return Encoder(
        tokenizer,
        keys=data.keys,
        prompt_template=data.prompt_template,
        chat_template=data.chat_template,
        max_prompt_tokens=data.max_prompt_tokens,
        max_tokens=max_tokens or data.max_tokens,
        on_bad_row=data.on_bad_row,
    )


def tokenizer_of(data: DataSettings, init: str, field: str = "policy.init") -> Any:
    """The tokenizer that `data.tokenizer` names, else that of the model that the run starts from (the field's `init`).

    Raises UserError when that model lacks a row for some token.
    """
    tokenizer = load_tokenizer(data.tokenizer or init)
    if init != "config":
        require_room(tokenizer, init, field)
    return tokenizer


def require_room(tokenizer: Any, init: str, field: str) -> None:
    """Raises SettingError when the model at `init` has fewer embedding rows than the tokenizer has ids."""
    rows = getattr(config_of(init).get_text_config(), "vocab_size", None)
    needed = rows_needed(tokenizer.get_vocab())
    if rows is not None and rows < needed:
        raise SettingError(field, f"{init}: {too_small(rows, needed)}")


def require_same_tokens(tokenizer: Any, init: str, field: str) -> None:
    """Raises SettingError when the model at `init` reads other token ids; a folder without any is taken at its word."""
    require_room(tokenizer, init, field)
    if not has_same_tokens(tokenizer, init, field):
        raise SettingError(field, f"the tokenizer of {init} is not the policy's, so it would read other tokens")


def has_same_tokens(tokenizer: Any, init: str, field: str) -> bool:
    """Whether the model at `init` reads the tokenizer's ids; a folder without a tokenizer is taken to."""
    if Path(init).is_dir() and not has_tokenizer(Path(init)):
        return True
    return bool(load_vocabulary(init, field) == tokenizer.get_vocab())


def require_critic_start(tokenizer: Any, reward: str) -> None:
    """Raises SettingError, naming critic.init, when `reward.init` cannot be copied into a critic of these tokens."""
    if names_function(reward):
        why = f"reward.init {reward} is a function"
    elif not has_same_tokens(tokenizer, reward, "reward.init"):
        why = f"the tokenizer of the reward model {reward} is not the policy's"
    else:
        return
    raise SettingError(
        "critic.init",
        f"{why}, so it cannot start the critic: set critic.init to a folder with the policy's tokenizer "
        "(policy.init gets a new value head)",
    )


def lacks_value_head(init: str) -> bool:
    """Whether a model is a causal language model, which needs a new head to be a critic."""
    architectures = getattr(config_of(init), "architectures", None) or []
    return bool(architectures) and not any("ForSequenceClassification" in name for name in architectures)


def load_rows(
    field: str,
    sources: list[str],
    encode: Callable[[Sequence[Record]], Encoded[Row]],
    report: Report,
    first: int | None = None,
) -> list[Row]:
    """The (first) rows of the sources that the config's `field` names, encoded; how many were left out is reported.

    No source, no rows. Collective. Raises UserError when none of the rows that are there can be used.
    """
    if not sources:
        return []
    encoded = read_alike(field, lambda: encode(read_sources(sources)[:first]))
    report.say(f"{field}: {encoded.describe()}")
    report.left_out(field, encoded.dropped)
    return encoded.rows


def text_blocks(field: str, sources: list[str], encoder: Encoder, report: Report) -> list[Block]:
    """Pretraining text in blocks of `encoder.max_tokens`; no source, no blocks. Collective."""
    if not sources:
        return []
    encoded = read_alike(field, lambda: encoder.blocks(read_sources(sources)))
    if encoded.dropped:
        report.say(f"{field}: {encoded.left_out()}")
        report.left_out(field, encoded.dropped)
    return encoded.rows


def rollout_of(rollout: RolloutSettings) -> dict[str, Any]:
    """What a model that answers is loaded with."""
    return {
        "tp_size": rollout.tp_size,
        "slots": rollout.slots,
        "bucket_bytes": rollout.bucket_mb << 20,
        "keep_weights": rollout.keep_weights,
        "attention": rollout.attention,
        "record_steps": rollout.record_steps,
        "offload_optimizer": rollout.offload_optimizer,
    }


def frozen(common: dict[str, Any]) -> dict[str, Any]:
    """How a model is loaded that does not train: with `ALONE` of a training model's micro-batches in one."""
    tokens = common["micro_batch_tokens"]
    sizes = {"micro_batch_size": ALONE * common["micro_batch_size"], "micro_batch_tokens": tokens and ALONE * tokens}
    return {**common, **sizes}


def offloaded(common: dict[str, Any], offload: bool) -> dict[str, Any]:
    """How a model is loaded that the config's section may ask to keep in host memory."""
    return {**common, "deepspeed_extra": on_host(common["deepspeed_extra"])} if offload else common


def stop_tokens(tokenizer: Any, module: Any) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's EOS, and what the model's generation config adds (chat models)."""
    more = module.generation_config.eos_token_id
    return tuple(sorted({int(tokenizer.eos_token_id), *([more] if isinstance(more, int) else more or [])}))


def sampling_of(rollout: RolloutSettings, tokenizer: Any, module: Any, seed: int) -> Sampling:
    """How the model writes: the config's section, and what ends a response."""
    return Sampling(
        rollout.max_new_tokens,
        stop_tokens(tokenizer, module),
        rollout.temperature,
        seed,
        rollout.top_k,
        rollout.top_p,
        StopStrings(tokenizer, rollout.stop) if rollout.stop else None,
    )


def at_least(rows: list[Any], count: int, what: str) -> None:
    """Raises UserError when a data set is too small for one batch."""
    if len(rows) < count:
        raise UserError(f"{what}: {len(rows)} usable rows are left, at least {count} are needed")
