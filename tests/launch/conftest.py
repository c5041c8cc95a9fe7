"""A folder with the small files that configs name: data, model folders, tokenizers; and that of a demo's run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gearshift.errors import UserError
from gearshift.launch.config import load

from .report_files import write_demo

VOCABULARY = {"a": 0, "b": 1, "c": 2}


def model_folder(path: Path, vocabulary: dict[str, int] = VOCABULARY, **fields: Any) -> Path:
    """config.json and tokenizer.json of a model, and a whole safetensors file without a tensor in it."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, **fields}
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": [{"id": 3, "content": "<eos>"}]}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of the test, with data and models in it and no launcher or GPU around."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "2 + 2 ="}\n')
    Path("answers.jsonl").write_text('{"prompt": "2 + 2 =", "completion": "4"}\n')
    Path("pairs.jsonl").write_text('{"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"}\n')
    Path("text.txt").write_text("Once upon a time.\n")
    model_folder(tmp_path / "sft")
    model_folder(tmp_path / "reward", architectures=["LlamaForSequenceClassification"])
    return tmp_path


def example(command: str) -> dict[str, Any]:
    """A small config of the command that is right on 2 ranks."""
    stage: dict[str, Any] = {
        "run": {"folder": f"runs/{command}"},
        "policy": {"init": "sft"},
        "data": {"train": ["prompts.jsonl"]},
        "train": {"batch_size": 8},
    }
    if command == "pretrain":
        stage["policy"] = {"init": "config", "config": {"model_type": "llama", "hidden_size": 64}}
        stage["data"] = {"train": "text.txt", "tokenizer": "train", "vocab_size": 512}
    if command == "sft":
        stage["data"] = {"train": "answers.jsonl"}
    if command == "reward":
        stage["data"] = {"train": "pairs.jsonl"}
    if command in ("ppo", "bench"):
        stage.pop("train")
        stage["reward"] = {"init": "reward"}
        stage["rollout"] = {"tp_size": 2}
        stage["ppo"] = {"episodes": 640, "batch_size": 64, "minibatches": 4}
    if command == "compare":
        stage = {
            "run": stage["run"],
            "systems": {"sft": {"init": "sft"}},
            "reference": {"init": "sft"},
            "reward": {"init": "reward"},
            "data": {"validation": "prompts.jsonl"},
        }
    return stage


def write(values: dict[str, Any], path: str = "config.yaml") -> str:
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def changed(values: dict[str, Any], setting: str, value: Any) -> dict[str, Any]:
    """The config with one setting put in; `...` takes it out."""
    *sections, name = setting.split(".")
    inner = values
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    if value is ...:
        del inner[name]
    return values


def error_of(command: str, values: dict[str, Any], ranks: int = 2, overrides: tuple[tuple[str, str], ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        load(command, write(values), overrides, ranks=ranks)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at these pictures: fewer pixels make the tests three times as fast."""
    monkeypatch.setattr("gearshift.launch.report.style.DPI", 40)


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The run folder of a small demo; see `report_files`."""
    return write_demo(tmp_path / "demo")
