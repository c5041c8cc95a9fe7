"""Config sections of the algorithm, and the typed config of each command. No torch here.

Numbers are InstructGPT's (arXiv 2203.02155, appendix C) where it gives them; "C.4" below is its section.
Paths are relative to the directory that the command is started in.
"""

from __future__ import annotations

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
from gearshift.rlhf.compare_settings import CompareSettings, SystemSettings
from gearshift.rlhf.data.formats import Keys
from gearshift.rlhf.ppo_settings import PpoSettings, PtxSettings


def _refuse_fp16(value: Any) -> Any:
    if str(value).lower() in ("fp16", "float16", "half"):
        raise PydanticCustomError("fp16", "fp16 is not supported (no loss scaling): use bf16 or fp32")
    return value


class RunSettings(Section):
    """Where a run writes, and on what."""

    folder: str = Field(description="Run folder: config.yaml, metrics.jsonl, samples.jsonl, tensorboard/, model/")
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


class CriticSettings(Section):
    """The value function of PPO."""

    init: str = Field("reward", description='"reward": a copy of the reward model, head and bias included; or a folder')
    learning_rate: float = Field(9e-6, gt=0, description="Peak rate per optimizer step (InstructGPT C.4)")


class ReferenceSettings(Section):
    """The model that the KL penalty holds the policy to."""

    init: str = Field("policy", description='"policy": the policy as it starts; or a Hugging Face folder')


class FixedReferenceSettings(Section):
    """The model that a comparison measures KL against."""

    init: str = Field(description="Hugging Face folder or hub name, such as the SFT model")


class RewardSettings(Section):
    """The trained reward model."""

    init: str = Field(description="Hugging Face sequence-classification folder")


class DataSettings(Section):
    """Where rows come from, what their fields are called, and how text becomes tokens."""

    train: Sources = Field([], description="Sources: .jsonl, .jsonl.gz, .parquet, .txt or a hub name")
    validation: Sources = Field([], description="Sources that are never trained on; [] : no validation")
    tokenizer: str | None = Field(
        None, description='Folder or hub name; null: that of policy.init; "train": a new one (policy.init: config)'
    )
    tokenizer_text: Sources = Field([], description="tokenizer: train: sources it is trained on; [] : data.train")
    vocab_size: int | None = Field(
        None, ge=258, description="tokenizer: train: its size, tokens; 258 are every byte, EOS and pad"
    )
    max_prompt_tokens: int = Field(
        1024, ge=1, description="Longer prompts are filtered out and counted, never cut; tokens (InstructGPT C: 1k)"
    )
    max_tokens: int = Field(
        2048, ge=2, description="Longest training sequence, prompt and completion; tokens (InstructGPT C: 2k)"
    )
    prompt_template: str = Field("{prompt}", description="Text of a prompt; {prompt}, once, stands for the row's")
    chat_template: bool = Field(False, description="Wrap prompts in the tokenizer's chat template")
    prompt_key: str = Field("prompt", description="Row field of the prompt")
    completion_key: str = Field("completion", description="Row field of a demonstration's completion")
    messages_key: str = Field("messages", description="Row field of a conversation (list of role and content)")
    chosen_key: str = Field("chosen", description="Row field of the better completion of a pair")
    rejected_key: str = Field("rejected", description="Row field of the worse completion of a pair")
    context_key: str = Field("context", description="Row field of the prompt of a ranked row")
    completions_key: str = Field("completions", description="Row field of K ranked completions (text and rank each)")
    text_key: str = Field("text", description="Row field of pretraining text")
    inputs_key: str = Field("inputs", description="Row field of the prompt in FLAN and P3 format")
    targets_key: str = Field("targets", description="Row field of the completion in FLAN and P3 format")
    turn: str = Field(
        "\n\nAssistant:", description="What opens the assistant's turn where chosen and rejected hold the prompt"
    )

    @property
    def keys(self) -> Keys:
        """The names of the rows' fields."""
        return Keys(
            prompt=self.prompt_key,
            completion=self.completion_key,
            messages=self.messages_key,
            chosen=self.chosen_key,
            rejected=self.rejected_key,
            context=self.context_key,
            completions=self.completions_key,
            text=self.text_key,
            inputs=self.inputs_key,
            targets=self.targets_key,
            turn=self.turn,
        )


class RewardDataSettings(DataSettings):
    """Rows of comparisons, and the demonstrations that fix the reward's zero."""

    demonstrations: Sources = Field(
        [], description="Sources of demonstrations whose mean reward the bias makes 0 (InstructGPT 3.5); [] : bias 0"
    )


class TrainSettings(Section):
    """Epochs, batches and the rate's schedule of a supervised stage."""

    epochs: int = Field(
        1, ge=1, description="Passes over the training rows (InstructGPT: SFT 16, before PPO 2, reward 1)"
    )
    batch_size: int = Field(
        32, ge=1, description="Sequences (reward: prompts) per optimizer step, all ranks together (InstructGPT C.1)"
    )
    micro_batch_size: int = Field(
        8, ge=1, description="Rows (reward: prompts) per rank in one forward and backward; changes memory only"
    )
    schedule: Literal["constant", "cosine"] = Field("cosine", description="Learning rate after warm-up")
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps of linear warm-up (InstructGPT C.1: none)")
    final_fraction: float = Field(
        0.1, ge=0, le=1, description="cosine: last rate as a part of the peak (InstructGPT C.1)"
    )
    validate_every: int = Field(0, ge=0, description="Optimizer steps between validations; 0: only at the end")
    pretraining_fraction: float = Field(
        0.0, ge=0, lt=1, description="SFT: part of the rows that is pretraining text (InstructGPT C.3: 0.1 before PPO)"
    )
    pretraining: Sources = Field([], description="SFT: sources of that text")


class TrackingSettings(Section):
    """Where metrics go besides metrics.jsonl."""

    trackers: list[str] = Field(["tensorboard"], description="tensorboard, wandb, mlflow ... (accelerate's names)")
    samples: int = Field(8, ge=0, description="ppo: rows written to samples.jsonl each time")


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


class RewardConfig(PretrainConfig):
    """A reward model from ranked completions; policy.init is the SFT model whose backbone it starts from."""

    data: RewardDataSettings


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
    """Systems side by side on the same prompts: scores, win rates, KL, length, loss on pretraining text."""

    systems: dict[str, SystemSettings] = Field(min_length=1, description="Name -> the model it stands for")
    reference: FixedReferenceSettings
    reward: RewardSettings
    rollout: RolloutSettings = RolloutSettings()
    ptx: PtxSettings = PtxSettings()
    compare: CompareSettings = CompareSettings()
