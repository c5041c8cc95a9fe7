"""The config section `data`. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gearshift.engine.settings import Section, Sources
from gearshift.rlhf.data.formats import Keys


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
    on_bad_row: Literal["error", "skip"] = Field(
        "error",
        description="A broken row (no JSON, a field missing, an empty prompt, a rank of NaN): error names it and stops "
        "before training; skip leaves it out, counted, and named in left_out.txt",
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
    margin_key: str | None = Field(
        None,
        description="Row field by how much chosen is better than rejected, reward units, 0 or more: the pair's loss is "
        "-log sigmoid(r_chosen - r_rejected - margin) (Llama 2, 2307.09288, 3.2.2); null: margin 0",
    )
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
            margin=self.margin_key,
            turn=self.turn,
        )


class RewardDataSettings(DataSettings):
    """Rows of comparisons, and the demonstrations that fix the reward's zero."""

    demonstrations: Sources = Field(
        [], description="Sources of demonstrations whose mean reward the bias makes 0 (InstructGPT 3.5); [] : bias 0"
    )
