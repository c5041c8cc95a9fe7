"""Pretraining and SFT: one loss, held against `transformers`; which rows come in a batch; both stages end to end."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import CausalModel, TokenBatch, World
from gearshift.errors import UserError
from gearshift.launch import folders
from gearshift.launch.config import validate
from gearshift.rlhf.data.batches import collate_text
from gearshift.rlhf.data.encoding import Block, Demonstration, Encoder
from gearshift.rlhf.data.sampling import Sampler
from gearshift.rlhf.data.tokenizers import load_tokenizer
from gearshift.rlhf.language import _mixed_batches, language_loss, pretrain, sft, text_batches
from gearshift.rlhf.supervised import evaluate
from tests.rlhf.tiny import SENTENCES, VOCABULARY, Recorder, save_policy, text_rows, write_jsonl
from tests.worker_group import WorkerGroup

MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_policy(tmp_path_factory.mktemp("models") / "base"))


def mixed_rows(count: int) -> list[Demonstration | Block]:
    """Demonstrations and blocks of text in turn, of many lengths."""
    from array import array

    g = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return [int(t) for t in torch.randint(2, VOCABULARY, (length,), generator=g)]

    demonstrations: list[Demonstration | Block] = [
        Demonstration(tokens(1 + i % 4), tokens(1 + i)) for i in range(count)
    ]
    blocks: list[Demonstration | Block] = [Block(array("i", tokens(2 + i))) for i in range(count)]
    return [row for pair in zip(demonstrations, blocks, strict=True) for row in pair][:count]


def evaluated(world: World, folder: str, count: int, micro: int) -> dict[str, float]:
    model = CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=micro)
    return {k: float(v) for k, v in evaluate(model, language_loss, mixed_rows(count), collate_text).items()}


def transformers_loss(folder: str, rows: list[Demonstration | Block]) -> tuple[float, int]:
    """Mean −log p over response tokens of demonstrations and over all but the first token of blocks, row by row."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    losses: list[float] = []
    for row in rows:
        prompt = row.prompt if isinstance(row, Demonstration) else []
        tokens = torch.tensor(prompt + (row.completion if isinstance(row, Demonstration) else row.tokens.tolist()))
        with torch.no_grad():
            logprobs = torch.log_softmax(model(tokens[None]).logits[0].double(), -1)
        losses += [-float(logprobs[t - 1, tokens[t]]) for t in range(max(1, len(prompt)), len(tokens))]
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize(("count", "micro"), [(9, 2), (9, 16), (1, 2)])
def test_the_loss_is_transformers_own(two_ranks: WorkerGroup, policy_folder: str, count: int, micro: int) -> None:
    """A mean over tokens, not over rows, micro-batches or ranks; nine rows over two ranks, and one over two."""
    loss, tokens = transformers_loss(policy_folder, mixed_rows(count))
    for found in two_ranks.run(evaluated, policy_folder, count, micro, timeout=60):
        assert found["tokens"] == tokens
        assert found["loss"] == pytest.approx(loss, rel=1e-5)


def rows_of(batch: TokenBatch) -> list[list[int]]:
    """The tokens of each row up to its last target."""
    ends = [int((row != -100).nonzero()[-1]) + 1 for row in batch.targets]
    return [row[:end].tolist() for row, end in zip(batch.tokens, ends, strict=True)]


def worlds(count: int) -> list[World]:
    return [World(rank, count, rank, count, torch.device("cpu")) for rank in range(count)]


def test_ranks_share_every_batch() -> None:
    """Two ranks' rows together are one rank's, in each of the batches of two epochs and more."""
    rows = mixed_rows(11)
    streams = [text_batches(rows, Sampler(11, 4, seed=3), world) for world in worlds(1) + worlds(2)]
    for _ in range(7):
        one, first, second = (rows_of(next(stream)) for stream in streams)
        assert (len(first), len(second)) == (2, 2)
        assert sorted(first + second) == sorted(one)


def sft_values(folder: Path, init: str, **train: Any) -> dict[str, Any]:
    demonstrations = [{"prompt": f"{SENTENCES[i % 6]} {i} ", "completion": f"go {i}"} for i in range(16)]
    return {
        "run": {"folder": str(folder / "sft")},
        "policy": {"init": init},
        "data": {
            "train": write_jsonl(folder / "sft.jsonl", demonstrations),
            "validation": write_jsonl(folder / "held.jsonl", demonstrations[:5]),
            "max_tokens": 48,
            "max_prompt_tokens": 40,
        },
        "train": {"epochs": 2, "batch_size": 8, "micro_batch_size": 2, **train},
        "optimizer": {"learning_rate": 3e-3},
    }


def test_pretraining_text_is_its_part_of_every_batch(policy_folder: str, tmp_path: Path) -> None:
    """A quarter of 8 rows: two blocks of text beside six demonstrations, over one rank and over two."""
    text = [write_jsonl(tmp_path / "text.jsonl", text_rows(6))]
    config: Any = validate(
        "sft", sft_values(tmp_path, policy_folder, pretraining=text, pretraining_fraction=0.25, batch_size=8)
    )
    encoder = Encoder(load_tokenizer(policy_folder), max_tokens=48)
    demonstrations = [Demonstration([5, 6, 7 + i], [9, 0]) for i in range(16)]
    common = (config, demonstrations, encoder)
    found = [_mixed_batches(*common, world, Recorder()) for world in worlds(1) + worlds(2)]
    batches, steps, _ = zip(*found, strict=True)
    # 16 demonstrations, six in a batch, twice: 32 / 6 batches.
    assert steps == (6, 6, 6)
    seen: list[int] = []
    for _ in range(6):
        one, first, second = (next(stream) for stream in batches)
        assert len(one) == 8
        is_text = (one.targets[:, 0] != -100).tolist()
        assert is_text == [False] * 6 + [True] * 2
        assert sorted(rows_of(first) + rows_of(second)) == sorted(rows_of(one))
        seen += one.tokens[:6, 2].tolist()
    assert all(seen.count(7 + i) >= 2 for i in range(16)), "every demonstration comes in each epoch"


def train(world: World, command: str, values: dict[str, Any]) -> list[dict[str, float]]:
    config: Any = validate(command, values)
    report = Recorder()
    {"pretrain": pretrain, "sft": sft}[command](config, report)
    return report.metrics


def pretrain_values(folder: Path) -> dict[str, Any]:
    return {
        "run": {"folder": str(folder / "base"), "seed": 4},
        "policy": {"init": "config", "config": MODEL},
        "data": {
            "train": write_jsonl(folder / "text.jsonl", text_rows(30)),
            "validation": write_jsonl(folder / "held_text.jsonl", text_rows(3)),
            "tokenizer": "train",
            "vocab_size": 270,
            "max_tokens": 24,
        },
        "train": {"epochs": 2, "batch_size": 8, "micro_batch_size": 2, "schedule": "constant", "warmup_steps": 4},
        "optimizer": {"learning_rate": 1e-2},
    }


def test_a_base_model_from_nothing_and_its_sft(one_rank: WorkerGroup, two_ranks: WorkerGroup, tmp_path: Path) -> None:
    """A tokenizer and a model from text, then SFT of that folder; losses fall, and one rank's run is two ranks'."""
    values = pretrain_values(tmp_path)
    found = two_ranks.run(train, "pretrain", values, timeout=60)[0]
    check_metrics(found)
    assert found[0]["loss/train"] == pytest.approx(math.log(270), rel=0.02), "a new model knows nothing"
    assert found[-1]["loss/validation"] < 0.8 * found[0]["loss/train"]
    assert [m["optimizer/learning_rate"] for m in found[:5]] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2])
    alone = one_rank.run(train, "pretrain", {**values, "run": {"folder": str(tmp_path / "alone"), "seed": 4}})[0]
    assert [m["loss/train"] for m in alone] == pytest.approx([m["loss/train"] for m in found], rel=1e-4)
    check_folder(tmp_path / "base/model")
    tuned = two_ranks.run(train, "sft", sft_values(tmp_path, str(tmp_path / "base/model")), timeout=60)[0]
    check_metrics(tuned)
    assert tuned[-1]["loss/validation"] < tuned[0]["loss/train"]
    check_folder(tmp_path / "sft/model")


def check_metrics(found: list[dict[str, float]]) -> None:
    names = {
        "loss/train",
        "optimizer/learning_rate",
        "optimizer/grad_norm",
        "timing/step",
        "throughput/tokens_per_second",
    }
    assert all(set(m) - {"loss/validation"} == names for m in found)
    assert "loss/validation" in found[-1]
    assert all(math.isfinite(value) for m in found for value in m.values())


def check_folder(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config.vocab_size == len(load_tokenizer(str(folder))) == 270
    assert model.config.eos_token_id == 0
    assert (folders.model_config(str(folder)) or {})["architectures"] == ["LlamaForCausalLM"]


def told_of_bad_rows(world: World, values: dict[str, Any]) -> tuple[str, Recorder]:
    report = Recorder()
    try:
        sft(validate("sft", values), report)  # type: ignore[arg-type]
    except UserError as error:
        return str(error), report
    return "", report


def told_of_other_files(world: World, values: dict[str, Any], other: str) -> tuple[str, Recorder]:
    """Where rank 1 sees another file."""
    data = {**values["data"], **({"train": other} if world.rank else {})}
    return told_of_bad_rows(world, {**values, "data": data})


def test_bad_rows_mean_the_same_on_every_rank(two_ranks: WorkerGroup, policy_folder: str, tmp_path: Path) -> None:
    """Both ranks stop with one line before any step; or both leave the same rows out, and none waits for the other."""
    values = sft_values(tmp_path, policy_folder)
    rows = Path(values["data"]["train"])
    rows.write_text("{\n" + rows.read_text() + '{"prompt": "a"}\n')
    for message, report in two_ranks.run(told_of_bad_rows, values, timeout=60):
        assert message.startswith(f"{rows}:1: is not valid JSON")
        assert not report.metrics
    good = write_jsonl(tmp_path / "good.jsonl", [{"prompt": "a", "completion": "b"}] * 8)
    for message, report in two_ranks.run(told_of_other_files, values, good, timeout=60):
        assert message.startswith(f"{rows}:1: is not valid JSON"), "also on the rank whose own file is whole"
        assert not report.metrics
    values["data"]["on_bad_row"] = "skip"
    for message, _ in two_ranks.run(told_of_other_files, values, good, timeout=60):
        assert message.startswith("data.train: rank 1 keeps 8 rows and rank 0 16")
    for message, report in two_ranks.run(told_of_bad_rows, values, timeout=60):
        assert message == ""
        assert len(report.metrics) == 4, "16 rows of 18, 8 a step, twice"
        assert len(report.rows_left_out["data.train", "broken"]) == 2
        assert any(line.startswith("data.train: 16 of 18 rows; left out: 2 broken") for line in report.lines)
