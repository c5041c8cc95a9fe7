"""The reward model: its loss against a loop over pairs, its gradients over ranks and micro-batches, the whole stage."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.engine import RewardModel, Training, World
from gearshift.engine.saving import gathered_parameters
from gearshift.launch import folders
from gearshift.launch.config import validate
from gearshift.rlhf.data.batches import ComparisonBatch, collate_comparisons
from gearshift.rlhf.data.encoding import Comparison, Encoder, split_in_pairs
from gearshift.rlhf.data.sources import read_sources
from gearshift.rlhf.data.tokenizers import load_tokenizer
from gearshift.rlhf.reward import answer_rewards, mean_demonstration_reward, measure, reward, reward_loss
from tests.rlhf.tiny import SENTENCES, Recorder, save_policy, write_jsonl
from tests.worker_group import WorkerGroup

VOCABULARY = 50
FIGURES = ("loss/validation", "reward/accuracy", "reward/accuracy_low", "reward/accuracy_high")
FIGURES += ("reward/calibration_error",)


def comparisons(count: int, seed: int = 0) -> list[Comparison]:
    """Prompts with 1 to 5 answers, ranks with ties; some rows have no pair at all."""
    g = torch.Generator().manual_seed(seed)

    def tokens(longest: int) -> list[int]:
        length = int(torch.randint(1, longest + 1, (1,), generator=g))
        return [int(t) for t in torch.randint(0, VOCABULARY, (length,), generator=g)]

    rows = []
    for b in range(count):
        answers = 1 + b % 5
        ranks = [float(r) for r in torch.randint(0, 3, (answers,), generator=g)]
        margin = 0.0 if b % 3 else 0.25 * b
        rows.append(Comparison(tokens(4), [tokens(6) for _ in range(answers)], ranks, margin))
    return rows


def pairs_of(row: Comparison) -> list[tuple[int, int]]:
    every = range(len(row.ranks))
    return [(i, j) for i in every for j in every if row.ranks[i] < row.ranks[j]]


class Table:
    """A model whose value at a position is the sum of its tokens' entries up to there."""

    def __init__(self) -> None:
        values = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        self.table = values.requires_grad_()

    def values_at(self, positions: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.table[tokens].cumsum(1).gather(1, positions)

    def reward(self, row: Comparison, answer: int) -> Tensor:
        """The value at an answer's last token, written out."""
        return torch.stack([self.table[t] for t in row.prompt + row.completions[answer]]).sum()


def naive_loss(model: Table, rows: list[Comparison]) -> Tensor:
    """−(1/pairs) Σ log σ(r_w − r_l − margin) of each prompt with a pair, and their mean (InstructGPT, equation 1)."""
    losses = []
    for row in rows:
        pairs = pairs_of(row)
        gaps = [model.reward(row, i) - model.reward(row, j) - row.margin for i, j in pairs]
        if gaps:
            losses.append(sum(torch.log1p(torch.exp(-gap)) for gap in gaps) / len(gaps))
    return torch.stack([torch.as_tensor(loss) for loss in losses]).mean()


def test_the_loss_and_its_gradient_are_those_of_a_loop() -> None:
    """Ties make no pair, absent answers none either, a prompt without a pair does not count, a filler adds nothing."""
    rows, model, own = comparisons(20), Table(), Table()
    assert any(not pairs_of(row) and len(row.ranks) > 1 for row in rows), "a row of ties alone must be there"
    assert {len(row.ranks) for row in rows} == {1, 2, 3, 4, 5}
    expected = naive_loss(own, rows)
    expected.backward()
    with_pairs = sum(bool(pairs_of(row)) for row in rows)
    for batch_rows in (rows, [*rows[:7], None, *rows[7:]]):
        model.table.grad = None
        batch = collate_comparisons(batch_rows)
        assert int(batch.loss_count) == with_pairs
        found = reward_loss(model, batch, batch.loss_count)  # type: ignore[arg-type]
        found.loss.backward()
        assert found.loss.item() == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(model.table.grad, own.table.grad, rtol=1e-10, atol=1e-12)
        check_metrics(found.metrics, rows, model)


def check_metrics(metrics: dict[str, Tensor], rows: list[Comparison], model: Table) -> None:
    right = sum(float(model.reward(row, i) > model.reward(row, j)) for row in rows for i, j in pairs_of(row))
    assert float(metrics["pairs"]) == sum(len(pairs_of(row)) for row in rows)
    assert float(metrics["right"]) == right > 0
    assert float(metrics["tokens"]) == sum(len(row.prompt + c) for row in rows for c in row.completions)


def test_two_answers_are_the_pairwise_loss() -> None:
    """Bradley–Terry by hand: rewards 1 and 3, the first preferred: −log σ(−2) = log(1 + e²)."""
    model = Table()
    with torch.no_grad():
        model.table[:3] = torch.tensor([0.0, 1.0, 3.0])
    batch = collate_comparisons([Comparison([0], [[1], [2]], [0.0, 1.0])])
    found = reward_loss(model, batch, batch.loss_count)  # type: ignore[arg-type]
    assert found.loss.item() == pytest.approx(math.log(1 + math.exp(2)), rel=1e-12)
    assert float(found.metrics["right"]) == 0


def test_pairs_as_rows_of_their_own_have_the_same_loss() -> None:
    """Where every prompt has as many pairs; and each pair keeps its prompt, its order and its margin."""
    row = Comparison([1, 2], [[3], [4], [5]], [2.0, 1.0, 2.0], 0.5)
    assert split_in_pairs(row) == [
        Comparison([1, 2], [[4], [3]], [0.0, 1.0], 0.5),
        Comparison([1, 2], [[4], [5]], [0.0, 1.0], 0.5),
    ]
    rows, model = [row, dataclasses.replace(row, prompt=[7], ranks=[0.0, 0.0, 1.0])], Table()
    pairs = [pair for row in rows for pair in split_in_pairs(row)]
    losses = [
        reward_loss(model, batch, batch.loss_count).loss.item()  # type: ignore[arg-type]
        for batch in (collate_comparisons(rows), collate_comparisons(pairs))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_a_batch_of_fillers_alone_has_no_loss() -> None:
    model, batch = Table(), collate_comparisons([None, None])
    assert int(batch.loss_count) == 0
    found = reward_loss(model, batch, torch.tensor(1.0))  # type: ignore[arg-type]
    found.loss.backward()
    assert found.loss.item() == 0
    assert model.table.grad is not None, "ZeRO-3 needs the backward pass of every rank"
    assert (model.table.grad == 0).all()
    assert answer_rewards(model, batch).shape == (2, 1)  # type: ignore[arg-type]


ROWS = 16


def load_trained(world: World, folder: str, micro: int) -> RewardModel:
    training = Training(learning_rate=0.1, optimizer="sgd", max_grad_norm=0.0)
    return RewardModel.load(
        folder, world, dtype=torch.float32, micro_batch_size=micro, training=training, new_head=True
    )


def one_sgd_step(world: World, folder: str, micro: int, rows: int) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_grad

    model = load_trained(world, folder, micro)
    batch: ComparisonBatch = collate_comparisons(comparisons(rows)).select(world.share(rows))
    sums = model.accumulate(reward_loss, batch)
    gradients = {name: safe_get_full_grad(p).clone() for name, p in model.module.named_parameters()}
    model.step()
    weights = dict(gathered_parameters(model.module))
    return {"sums": {k: float(v) for k, v in sums.items()}, "gradients": gradients, "weights": weights}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    difference = sum(float((a[n].double() - b[n].double()).square().sum()) for n in a)
    return float((difference / sum(float(b[n].double().square().sum()) for n in b)) ** 0.5)


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_policy(tmp_path_factory.mktemp("models") / "sft"))


def test_gradients_know_neither_ranks_nor_micro_batches(
    one_rank: WorkerGroup, two_ranks: WorkerGroup, policy_folder: str
) -> None:
    """Prompts with different numbers of pairs, and some with none: a mean of micro-batch means would differ."""
    reference = one_rank.run(one_sgd_step, policy_folder, ROWS, ROWS)[0]
    assert sum(float(g.abs().sum()) for g in reference["gradients"].values()) > 0
    for group in (one_rank, two_ranks):
        for micro in (1, 2, 8):
            found = group.run(one_sgd_step, policy_folder, micro, ROWS)[0]
            assert abs(found["sums"]["loss"] - reference["sums"]["loss"]) <= 1e-6 * max(1, reference["sums"]["loss"])
            assert {k: found["sums"][k] for k in ("pairs", "right", "tokens")} == {
                k: reference["sums"][k] for k in ("pairs", "right", "tokens")
            }
            assert distance(found["gradients"], reference["gradients"]) <= 1e-5
            assert distance(found["weights"], reference["weights"]) <= 1e-5


def test_ranks_with_unequal_rows(one_rank: WorkerGroup, two_ranks: WorkerGroup, policy_folder: str) -> None:
    reference = one_rank.run(one_sgd_step, policy_folder, 13, 13)[0]
    found = two_ranks.run(one_sgd_step, policy_folder, 2, 13)[0]
    assert found["sums"]["loss"] == pytest.approx(reference["sums"]["loss"], abs=1e-6)
    assert distance(found["gradients"], reference["gradients"]) <= 1e-5


def ranked_rows(count: int) -> list[dict[str, Any]]:
    """Three answers to a prompt; the best one says 'mat', the worst 'dog'."""
    return [
        {
            "context": f"{SENTENCES[i % 6]} {i}",
            "completions": [
                {"text": f"the dog {i}", "rank": 3},
                {"text": f"the mat {i}", "rank": 1},
                {"text": f"a line {i}", "rank": 2},
            ],
        }
        for i in range(count)
    ]


def train_reward(world: World, values: dict[str, Any]) -> Recorder:
    config: Any = validate("reward", values)
    report = Recorder()
    reward(config, report)
    return report


def demonstrations_of(folder: str, path: str) -> Any:
    return Encoder(load_tokenizer(folder), max_tokens=64).demonstrations(read_sources([path])).rows


def judge(world: World, folder: str, demonstrations: str, comparisons_path: str) -> tuple[float, float, dict[str, Any]]:
    """Bias, mean reward of demonstrations with the bias subtracted, accuracy; of a saved folder."""
    model = RewardModel.load(folder, world, dtype=torch.float32, micro_batch_size=2)
    rows = demonstrations_of(folder, demonstrations)
    held_out = Encoder(load_tokenizer(folder), max_tokens=64).comparisons(read_sources([comparisons_path])).rows
    # `mean_demonstration_reward` gives the bias that makes the mean 0: subtract what the model subtracts.
    return model.bias, mean_demonstration_reward(model, rows) - model.bias, measure(model, held_out)


def test_the_stage(two_ranks: WorkerGroup, policy_folder: str, tmp_path: Path) -> None:
    """The held-out loss falls below log 2, the bias makes five demonstrations' mean 0, the folder is a reward model."""
    demonstrations = [{"prompt": f"{SENTENCES[i]}", "completion": f"the mat {i} and {'on ' * i}"} for i in range(5)]
    paths = {
        "train": write_jsonl(tmp_path / "train.jsonl", ranked_rows(24)),
        "validation": write_jsonl(tmp_path / "validation.jsonl", ranked_rows(31)[24:]),
        "demonstrations": write_jsonl(tmp_path / "demonstrations.jsonl", demonstrations),
    }
    values = {
        "run": {"folder": str(tmp_path / "run"), "seed": 2},
        "policy": {"init": policy_folder},
        "data": {**paths, "max_tokens": 64, "max_prompt_tokens": 40},
        "train": {"epochs": 3, "batch_size": 8, "micro_batch_size": 2, "validate_every": 3},
        "optimizer": {"learning_rate": 3e-3},
    }
    report = two_ranks.run(train_reward, values, timeout=60)[0]
    found = report.metrics
    assert len(found) == 9
    assert [i + 1 for i, m in enumerate(found) if "loss/validation" in m] == [3, 6, 9]
    assert found[-1]["loss/validation"] < min(math.log(2), found[2]["loss/validation"])
    assert found[-1]["reward/accuracy"] > 0.9
    rates = [m["optimizer/learning_rate"] for m in found]
    assert (rates[0], rates[-1]) == pytest.approx((3e-3, 3e-4)), "cosine to a tenth at the last step"
    check_the_folder(two_ranks, str(tmp_path / "run/model"), paths, found[-1])


def test_the_stage_pair_by_pair(two_ranks: WorkerGroup, policy_folder: str, tmp_path: Path) -> None:
    """24 prompts with 3 pairs each are 72 rows, 9 steps of 8; held-out prompts stay whole."""
    values = {
        "run": {"folder": str(tmp_path / "run"), "seed": 2},
        "policy": {"init": policy_folder},
        "data": {
            "train": write_jsonl(tmp_path / "train.jsonl", ranked_rows(24)),
            "validation": write_jsonl(tmp_path / "validation.jsonl", ranked_rows(31)[24:]),
            "max_tokens": 64,
            "max_prompt_tokens": 40,
        },
        "train": {"batch_size": 8, "micro_batch_size": 4, "pairs": "pairwise"},
        "optimizer": {"learning_rate": 3e-3},
    }
    found = two_ranks.run(train_reward, values, timeout=60)[0].metrics
    assert len(found) == 9
    assert found[-1]["reward/accuracy"] > 0.9


def check_the_folder(two_ranks: WorkerGroup, folder: str, paths: dict[str, str], last: dict[str, float]) -> None:
    bias, mean, measured = two_ranks.run(judge, folder, paths["demonstrations"], paths["validation"], timeout=60)[0]
    assert abs(bias) > 1e-3
    assert abs(mean) < 1e-5
    assert set(measured) == {*FIGURES}
    assert measured == pytest.approx({k: last[k] for k in FIGURES}, rel=1e-5)
    assert measured["reward/accuracy_low"] < measured["reward/accuracy"] <= measured["reward/accuracy_high"]
    assert folders.model_problem(folder, classifier=True) is None
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    logits = []
    for row in demonstrations_of(folder, paths["demonstrations"]):
        with torch.no_grad():
            logits.append(float(model(torch.tensor([row.prompt + row.completion])).logits[0, 0]))
    assert sum(logits) / len(logits) == pytest.approx(bias, abs=1e-4), "other loaders' scores carry the bias"
