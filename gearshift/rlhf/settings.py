"""Config sections of the algorithm, and the typed config of each command. No torch here.

Numbers are InstructGPT's (arXiv 2203.02155, appendix C) where it gives them; "C.4" below is its section.
Paths are relative to the directory that the command is started in.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

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
)
from gearshift.rlhf.bench_settings import POLICY, BenchSettings
from gearshift.rlhf.compare_settings import CompareSettings, SystemSettings
from gearshift.rlhf.data.settings import DataSettings, RewardDataSettings
from gearshift.rlhf.ppo_settings import PpoSettings, PtxSettings
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
    join_seconds: float = Field(
        40.0, gt=0, description="At the start, wait so long for the ranks of other hosts before the run ends"
    )
    hang_seconds: float = Field(
        1800.0,
        ge=0,
        description="End the run when a rank gives no sign of life, or none comes further, for so long; 0: never",
    )


class ProfileSettings(Section):
    """A profile of some iterations (ppo) or steps: profile.md and profile/ in the run folder."""

    iterations: int = Field(
        0, ge=0, description="Iterations (ppo) or steps to profile, 0: none; --profile alone is 1 (docs/performance.md)"
    )
    after: int = Field(1, ge=0, description="Iterations or steps of this start that go before, to warm up")


class StageRunSettings(RunSettings):
    """Where a run writes, and on what."""

    profile: ProfileSettings = ProfileSettings()


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
    offload: bool = Field(False, description="As in gearshift ppo")


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
    offload: bool = Field(False, description="Its weights lie in host memory, fetched layer by layer")


class FixedReferenceSettings(Section):
    """The model that a comparison measures KL against."""

    init: str = Field(description="Hugging Face folder or hub name, such as the SFT model")
    offload: bool = Field(False, description="Its weights lie in host memory, fetched layer by layer")


class RewardSettings(Section):
    """What scores a response."""

    init: str = Field(
        description="Hugging Face sequence-classification folder or hub name with one output (text is tokenized again "
        'where its tokenizer is not the policy\'s); or "module:function", (prompts, responses, rows) -> scores'
    )
    chat_template: bool = Field(
        False, description="Give it prompt and response as turns of its own tokenizer's chat template"
    )
    offload: bool = Field(False, description="Its weights lie in host memory, fetched layer by layer")


class BenchRunSettings(StageRunSettings):
    """On what it is measured."""

    folder: str = Field("", description="Not read: gearshift bench writes to no run folder")


class BenchRewardSettings(RewardSettings):
    """What scores a response."""

    init: str = Field(
        POLICY,
        description='"policy": the policy\'s weights with a new head, and the critic like it; or as in gearshift ppo',
    )


class TrackingSettings(Section):
    """Where metrics go besides metrics.jsonl."""

    trackers: list[str] = Field(["tensorboard"], description="tensorboard, wandb, mlflow ... (accelerate's names)")
    samples: int = Field(8, ge=0, description="ppo: rows written to samples.jsonl each time")


class Config(Section):
    """What every command has."""

    run: RunSettings
    data: DataSettings
    deepspeed: DeepSpeedConfig = Field(default_factory=dict)

    @property
    def saves(self) -> bool:
        """Whether the run saves itself as it goes, and so when it is asked to stop."""
        return False


class PretrainConfig(Config):
    """A base model (and tokenizer) from text."""

    run: StageRunSettings
    policy: PolicySettings
    train: TrainSettings = TrainSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()

    @property
    def saves(self) -> bool:
        return self.checkpoint.every > 0


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

    run: StageRunSettings
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

    @property
    def saves(self) -> bool:
        return self.checkpoint.every > 0

    @property
    def has_critic(self) -> bool:
        """Whether advantages come from a value function."""
        return self.ppo.advantage == "gae"

    @property
    def critic_is_reward(self) -> bool:
        """Whether the critic starts as a copy of the reward model."""
        return self.has_critic and self.critic.init == "reward"


class BenchConfig(PpoConfig):
    """Seconds, bytes and memory of a few iterations of PPO, by a config as gearshift ppo takes it.

    Without one: random Llamas, whose sizes are policy.config; --model FOLDER: that one and others of its shape. Without
    data.train, prompts are random tokens, data.max_prompt_tokens long. Nothing is saved.
    """

    run: BenchRunSettings = BenchRunSettings(folder="")
    data: DataSettings = DataSettings()
    reward: BenchRewardSettings = BenchRewardSettings(init=POLICY)
    bench: BenchSettings = BenchSettings()

    @property
    def saves(self) -> bool:
        return False

    @property
    def all_of_one_shape(self) -> bool:
        """Whether all models are the policy's shape, since no reward model is named."""
        return self.reward.init == POLICY


class CompareConfig(Config):
    """Systems side by side on the same prompts: scores, win rates, KL, length, loss on pretraining text."""

    systems: dict[str, SystemSettings] = Field(min_length=1, description="Name -> the model it stands for")
    reference: FixedReferenceSettings
    reward: RewardSettings
    rollout: RolloutSettings = RolloutSettings()
    ptx: PtxSettings = PtxSettings()
    compare: CompareSettings = CompareSettings()
