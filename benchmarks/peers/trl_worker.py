"""TRL's iterations: its `PPOTrainer.train`, held up before each batch until it is this way's turn.

    python -m benchmarks.peers.trl_worker FOLDER     (`ppo_step.py` starts it, in an environment of its own)

With several processes under DeepSpeed's ZeRO-3, with the policy gathered for generation.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.peers.setting import Setting, prompts_of
from benchmarks.peers.worker import Channel, Clock, rank_and_size, turns


def main() -> None:
    channel = Channel()
    folder = Path(sys.argv[1])
    setting = Setting.load(folder)
    rank, size = rank_and_size()
    if size > 1:
        use_zero3(setting, folder, rank, size)
    else:  # accelerate would otherwise join a process group of one
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    trainer = trainer_of(setting, folder, size)
    trainer.dataloader = Batches(trainer, prompts_of(folder)[rank::size], channel)
    try:
        trainer.train()
    except NoMoreTurns:
        os._exit(0)  # without waiting for the threads of a process group


class NoMoreTurns(Exception):
    """Out of TRL's loop."""


class Batches:
    """In place of the trainer's dataloader: the same prompts each time, once it is this way's turn."""

    def __init__(self, trainer: Any, prompts: list[list[int]], channel: Channel):
        import torch

        self.batch, self.channel = {"input_ids": torch.tensor(prompts)}, channel
        self.clock = Clock()
        self._tell_phases(trainer)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for clock in turns(self.channel):
            self.clock = clock
            yield self.batch
            clock.ends("train")
        raise NoMoreTurns

    def _tell_phases(self, trainer: Any) -> None:
        """Generation ends with the model unwrapped for it, scoring where the first gradient is accumulated."""
        from trl.trainer import ppo_trainer

        unwrap, accumulate = ppo_trainer.unwrap_model_for_generation, trainer.accelerator.accumulate

        @contextmanager
        def unwrapped(*args: Any, **named: Any) -> Iterator[Any]:
            with unwrap(*args, **named) as model:
                yield model
            self.clock.ends("generation")

        def accumulating(*models: Any) -> Any:
            if "score" not in self.clock.seconds:
                self.clock.ends("score")
            return accumulate(*models)

        ppo_trainer.unwrap_model_for_generation = unwrapped
        trainer.accelerator.accumulate = accumulating


def use_zero3(setting: Setting, folder: Path, rank: int, size: int) -> None:
    """As `accelerate launch` with a DeepSpeed config would say it."""
    rows = setting.episodes // size
    path = folder / f"trl-zero3-{rank}.json"
    path.write_text(json.dumps({
        "zero_optimization": {
            "stage": 3,
            # With the default, the traces of submodules called by themselves grow until a look-ahead takes minutes.
            "stage3_max_reuse_distance": 1_000_000,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": min(setting.micro_batch, rows),
        "gradient_accumulation_steps": max(1, rows // setting.micro_batch),
        "gradient_clipping": 1.0,
    }))  # fmt: skip
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


def trainer_of(setting: Setting, folder: Path, size: int) -> Any:
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        DataCollatorWithPadding,
        PreTrainedTokenizerFast,
    )
    from trl import PPOConfig, PPOTrainer

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "policy/tokenizer.json"), eos_token="<|endoftext|>")
    # TRL takes every pad token for padding: one that the model has not, so that none is ever drawn.
    tokenizer.add_special_tokens({"pad_token": "<|no such token|>"})
    rows = setting.episodes // size
    config = PPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=setting.learning_rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=min(setting.micro_batch, rows),
        gradient_accumulation_steps=max(1, rows // setting.micro_batch),
        num_mini_batches=1,
        num_ppo_epochs=1,
        local_rollout_forward_batch_size=rows,
        total_episodes=setting.episodes * 1_000_000,  # until it is told to stop
        num_sample_generations=0,
        response_length=setting.new_tokens,
        temperature=1.0,
        kl_coef=setting.kl_coef,
        ds3_gather_for_generation=True,
    )
    dataset = Dataset.from_dict({"input_ids": prompts_of(folder)})
    reward = str(folder / "reward")
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        ref_model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        reward_model=AutoModelForSequenceClassification.from_pretrained(reward),
        value_model=AutoModelForSequenceClassification.from_pretrained(reward),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=DataCollatorWithPadding(tokenizer),
    )


if __name__ == "__main__":
    main()
