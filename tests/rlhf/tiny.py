"""What a run of the algorithm needs, as small as it can be: a tokenizer, a policy, a reward model, data files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.models import save_tiny, tiny_config

SENTENCES = [
    "the cat sat on the mat",
    "a dog ran over the hill and far away",
    "two and two make four",
    "one more line of text, the last but one",
    "say the word again",
    "the hill is far from the mat",
]
VOCABULARY = 261  # odd: two ranks hold 130 and 131 tokens


class Recorder:
    """A report that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done = 0
        self.metrics: list[dict[str, float]] = []
        self.rows: list[dict[str, Any]] = []
        self.rows_left_out: dict[tuple[str, str], list[str]] = {}

    def start(self, lines: Sequence[str], total: int, done: int = 0) -> None:
        self.lines += lines
        self.done = done

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        assert step == self.done + len(self.metrics) + 1
        self.metrics.append(dict(metrics))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows += [{"step": step, **row} for row in rows]

    def left_out(self, field: str, rows: Mapping[str, Sequence[str]]) -> None:
        self.rows_left_out |= {(field, reason): list(named) for reason, named in rows.items()}

    def say(self, line: str) -> None:
        self.lines.append(line)


def tiny_tokenizer() -> Any:
    from gearshift.rlhf.data.tokenizers import train_tokenizer

    tokenizer = train_tokenizer(SENTENCES, VOCABULARY)
    assert len(tokenizer) == VOCABULARY
    return tokenizer


def save_policy(folder: Path, seed: int = 0) -> Path:
    """A llama and its tokenizer. Its generation config ends responses at a third of the tokens, so lengths differ."""
    from transformers import GenerationConfig

    save_tiny("llama", folder, seed, vocab_size=VOCABULARY, eos_token_id=0, pad_token_id=1, bos_token_id=None)
    GenerationConfig(eos_token_id=[0, *range(100, 187)], pad_token_id=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_reward_model(folder: Path, seed: int = 1, bias: float = 0.375) -> Path:
    """A one-output llama with the same tokenizer and a bias, as `gearshift reward` leaves it."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    special = {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None}
    config = tiny_config("llama", vocab_size=VOCABULARY, num_labels=1, reward_bias=bias, **special)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompt_rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{SENTENCES[i % len(SENTENCES)][: 4 + i % 7]}{i}", "answer": i} for i in range(count)]


def text_rows(count: int) -> list[dict[str, Any]]:
    return [{"text": SENTENCES[i % len(SENTENCES)] + SENTENCES[i * 5 % len(SENTENCES)]} for i in range(count)]


def ppo_values(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A config of PPO with models, 20 prompts, 5 held-out ones and texts (`ptx`) in `folder`; `sections`: see
    `changed`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = write_jsonl(folder / "text.jsonl", text_rows(12))
    values = {
        "run": {"folder": str(folder / "run"), "seed": 3},
        "policy": {"init": str(save_policy(folder / "policy"))},
        "reward": {"init": str(save_reward_model(folder / "reward"))},
        "critic": {"learning_rate": 2e-3},
        "data": {
            "train": write_jsonl(folder / "prompts.jsonl", prompt_rows(20)),
            "validation": write_jsonl(folder / "held.jsonl", prompt_rows(25)[20:]),
            "max_prompt_tokens": 40,
        },
        "rollout": {"tp_size": 2, "max_new_tokens": 6},
        "ppo": {"micro_batch_size": 3, "samples_every": 1},
        "ptx": {"validation": [text], "data": [text], "examples_per_episode": 1, "max_tokens": 12},
        "optimizer": {"learning_rate": 1e-3},
        "tracking": {"samples": 3},
    }
    return changed(values, **sections)


def changed(values: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """The config with some fields of some sections changed."""
    return {**values, **{name: {**values.get(name, {}), **fields} for name, fields in sections.items()}}
