"""Config sections of the algorithm, and the typed config of each command. No torch here.

Numbers are InstructGPT's (arXiv 2203.02155, appendix C) where it gives them; "C.4" below is its section.
Paths are relative to the directory that the command is started in.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from gearshift.engine.checkpoints.settings import CheckpointSettings, PpoCheckpointSettings
from gearshift.engine.settings import (
    DeepSpeedConfig,
    Dtype,
    LoraSettings,
    OptimizerSettings,
    RolloutSettings,
    Section,
    Sources,
)
from gearshift.rlhf.data.settings import DataSettings, RewardDataSettings
from gearshift.rlhf.train_settings import RewardTrainSettings, SftTrainSettings, TrainSettings


def _refuse_fp16(value: Any) -> Any:
    if str(value).lower() in ("fp16", "float16", "half"):
        raise PydanticCustomError("fp16", "fp16 is not supported (no loss scaling): use bf16 or fp32")
    return value


class RunSettings(Section):
    """Where a run writes, and on what."""

    folder: str = Field(
        description="Run folder: config.yaml, metrics.jsonl, samples.jsonl, left_out.txt, tensorboard/, model/"
    )
    overwrite: bool = Field(False, description="Write into a folder that holds a finished run, in place of that run")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of data order, initial weights and sampling")
    ranks: int | None = Field(None, ge=1, description="Processes; null: one per GPU, or 2 without GPUs")
    dtype: Annotated[Dtype | None, BeforeValidator(_refuse_fp16)] = Field(
        None, description="Weights and activations: bf16 or fp32; null: bf16 on GPUs, fp32 on CPU"
    )


class PolicySettings(Section):
    """The model that is trained."""

    init: str = Field(description='Hugging Face folder or hub name to start from; "config": new weights')
    config: dict[str, Any] | None = Field(
        None, description="init: config only: model_type and the fields of its transformers config"
    )
    lora: LoraSettings | None = Field(
        None, description="Train adapters alone; null: all weights. model/ gets them merged, adapter/ as they are"
    )


class ChoosingRewardSettings(Section):
    """What scores the answers that choose a checkpoint."""

    init: str | None = Field(None, description="train.best: score: as reward.init of gearshift ppo; null: none")
    chat_template: bool = Field(False, description="As in gearshift ppo")


FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def names_function(init: str) -> bool:
    """Whether a field that takes a model names a Python function in its place: "module:function"."""
    return FUNCTION.fullmatch(init) is not None


class CriticSettings(Section):
    """The value function of PPO."""

    init: str = Field(
        "reward",
        description='"reward": a copy of the reward model, head and bias included; or a folder with the policy\'s '
        "tokenizer: a sequence classifier, or a causal language model, which gets a new value head",
    )
    learning_rate: float = Field(9e-6, gt=0, description="Peak rate per optimizer step (InstructGPT C.4)")


class ReferenceSettings(Section):
    """The model that the KL penalty holds the policy to."""

    init: str = Field("policy", description='"policy": the policy as it starts; or a Hugging Face folder')


class FixedReferenceSettings(Section):
    """The model that a comparison measures KL against."""

    init: str = Field(description="Hugging Face folder or hub name, such as the SFT model")


class RewardSettings(Section):
    """What scores a response."""

    init: str = Field(
        description="Hugging Face sequence-classification folder or hub name with one output (text is tokenized again "
        'where its tokenizer is not the policy\'s); or "module:function", (prompts, responses, rows) -> scores'
    )
    chat_template: bool = Field(
        False, description="Give it prompt and response as turns of its own tokenizer's chat template"
    )


class KlSettings(Section):
    """The KL penalty in the reward, per token."""

    coef: float = Field(0.02, ge=0, description="Penalty per nat (InstructGPT C.4); the first one when target is set")
    estimator: Literal["k1", "k2", "k3", "exact"] = Field(
        "k1", description="Of the KL from sampled tokens (k1 is the log-ratio), or exact: over the whole vocabulary"
    )
    target: float | None = Field(
        None,
        gt=0,
        description="KL per response that an adaptive coef aims at, nats (Ziegler et al. 2.2); null: fixed coef",
    )
    horizon: int = Field(10_000, ge=1, description="target: episodes over which coef adapts (Ziegler et al.: 10000)")


class PpoSettings(Section):
    """InstructGPT C.4, from the batch sizes to the clips."""

    episodes: int = Field(256_000, ge=1, description="Responses in the whole run, all ranks together (C.4)")
    batch_size: int = Field(512, ge=1, description="Episodes per iteration, all ranks together (C.4)")
    answers: int = Field(1, ge=1, description="Episodes of an iteration that answer the same prompt (C.4: 1)")
    minibatches: int = Field(8, ge=1, description="Optimizer steps that one pass over an iteration is cut into (C.4)")
    epochs: int = Field(1, ge=1, description="Passes over each iteration's episodes (C.4)")
    micro_batch_size: int = Field(8, ge=1, description="Rows per rank in one forward; changes memory only")
    clip: float = Field(0.2, gt=0, description="Bound on the probability ratio, 1 +- clip (C.4)")
    value_clip: float = Field(0.2, gt=0, description="Bound on a value's move from the rollout's, reward units (C.4)")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount per token (C.4: none)")
    lam: float = Field(0.95, ge=0, le=1, description="Lambda of generalised advantage estimation (Stiennon et al.)")
    whiten: bool = Field(True, description="Advantages: mean 0, deviation 1 over the iteration's response tokens")
    warmup_iterations: int = Field(10, ge=0, description="Iterations in which rates ramp up from a tenth (C.4)")
    kl: KlSettings = Field(KlSettings(), description="Penalty for leaving the reference")
    validate_every: int = Field(0, ge=0, description="Iterations between validations; 0: only at the end")
    samples_every: int = Field(10, ge=0, description="Iterations between rows of samples.jsonl; 0: none")

    @property
    def iterations(self) -> int:
        """Rounds of rollout and update."""
        return self.episodes // self.batch_size

    @property
    def prompts(self) -> int:
        """Prompts drawn per iteration, all ranks together."""
        return self.batch_size // self.answers

    @property
    def minibatch_size(self) -> int:
        """Episodes per optimizer step, all ranks together."""
        return self.batch_size // self.minibatches


class PtxSettings(Section):
    """The pretraining loss that PPO-ptx mixes into each policy step."""

    coef: float = Field(0.0, ge=0, description="Weight of the pretraining loss; 0: plain PPO (InstructGPT C.4: 27.8)")
    data: Sources = Field([], description="Sources of pretraining text")
    validation: Sources = Field([], description="Sources of held-out text; its loss is what PPO costs")
    examples_per_episode: int = Field(8, ge=1, description="Pretraining sequences per episode of a minibatch (C.4)")
    max_tokens: int = Field(2048, ge=2, description="Length of a pretraining sequence, tokens")


class TrackingSettings(Section):
    """Where metrics go besides metrics.jsonl."""

    trackers: list[str] = Field(["tensorboard"], description="tensorboard, wandb, mlflow ... (accelerate's names)")
    samples: int = Field(8, ge=0, description="ppo: rows written to samples.jsonl each time")


class SystemSettings(Section):
    """One model of a comparison."""

    init: str = Field(description="Hugging Face folder or hub name")
    prefix: str = Field("", description="Text put before every prompt (a few-shot prefix)")


class CompareSettings(Section):
    """How systems are compared."""

    prompts: int | None = Field(None, ge=1, description="Prompts answered, the first of data.validation; null: all")
    micro_batch_size: int = Field(8, ge=1, description="Rows per rank in one scoring forward; changes memory only")
    true_score: str | None = Field(
        None, description='Checker with known answers, "module:function" of (row, response) -> float; null: none'
    )


class Config(Section):
    """What every command has."""

    run: RunSettings
    data: DataSettings
    deepspeed: DeepSpeedConfig = Field(default_factory=dict)


class PretrainConfig(Config):
    """A base model (and tokenizer) from text."""

    policy: PolicySettings
    train: TrainSettings = TrainSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()


class SftConfig(PretrainConfig):
    """Supervised fine-tuning on demonstrations."""

    train: SftTrainSettings = SftTrainSettings()
    reward: ChoosingRewardSettings = ChoosingRewardSettings()
    rollout: RolloutSettings = RolloutSettings()


class RewardConfig(PretrainConfig):
    """A reward model from ranked completions; policy.init is the SFT model whose backbone it starts from."""

    data: RewardDataSettings
    train: RewardTrainSettings = RewardTrainSettings()


class PpoConfig(Config):
    """PPO, and PPO-ptx with ptx.coef above 0."""

    policy: PolicySettings
    reward: RewardSettings
    critic: CriticSettings = CriticSettings()
    reference: ReferenceSettings = ReferenceSettings()
    rollout: RolloutSettings = RolloutSettings()
    ppo: PpoSettings = PpoSettings()
    ptx: PtxSettings = PtxSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    checkpoint: PpoCheckpointSettings = PpoCheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()


class CompareConfig(Config):
    """Systems side by side on the same prompts: score, KL, length, loss on pretraining text."""

    systems: dict[str, SystemSettings] = Field(min_length=1, description="Name -> the model it stands for")
    reference: FixedReferenceSettings
    reward: RewardSettings
    rollout: RolloutSettings = RolloutSettings()
    ptx: PtxSettings = PtxSettings()
    compare: CompareSettings = CompareSettings()
