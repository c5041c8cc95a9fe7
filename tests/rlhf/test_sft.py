"""SFT's own parts on real models: residual dropout, the choice of the best checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import CausalModel, TokenBatch, Training, World
from gearshift.launch.config import validate
from gearshift.rlhf.language import language_loss, sft
from tests.models import SIZES, save_tiny
from tests.rlhf.test_language import sft_values
from tests.rlhf.test_resuming import weights
from tests.rlhf.tiny import Recorder, changed, save_policy, save_reward_model
from tests.worker_group import WorkerGroup

SCORES = [0.5, 2.0, -1.0, 1.0]
_calls = [0]


def losses(world: World, folder: str, rate: float, seed: int) -> dict[str, Any]:
    training = Training(learning_rate=0.0, optimizer="sgd")
    model = CausalModel.load(
        folder, world, dtype=torch.float32, micro_batch_size=2, training=training, seed=seed, residual_dropout=rate
    )
    tokens = torch.arange(60).view(6, 10) % SIZES["vocab_size"]
    batch = TokenBatch(tokens, tokens.roll(-1, 1)).select(world.share(6))
    found: dict[str, Any] = {"steps": []}
    for _ in range(2):
        found["evaluated"] = float(model.evaluate(language_loss, batch)["loss"])
        torch.rand(3)  # what else draws numbers must not matter
        found["steps"].append(float(model.accumulate(language_loss, batch)["loss"]))
        model.step()
    model.steps = 0
    found["again"] = float(model.accumulate(language_loss, batch)["loss"])
    return found


def test_only_training_steps_drop_and_each_step_drops_the_same(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    folder = str(save_tiny("gpt2", tmp_path / "gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1))
    plain = two_ranks.run(losses, folder, 0.0, 1)[0]
    # An evaluation takes two micro-batches at once, and adds up in another order.
    assert plain["steps"] == pytest.approx([plain["evaluated"]] * 2, rel=1e-6), "the family's own dropout is off"
    found, other = (two_ranks.run(losses, folder, 0.2, seed)[0] for seed in (1, 2))
    assert found["evaluated"] == plain["evaluated"]
    assert len({plain["evaluated"], *found["steps"], *other["steps"]}) == 5
    assert found["again"] == found["steps"][0]


def by_the_clock(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """The first validation's answers are worth 0.5, the second's 2, ..."""
    _calls[0] += 1
    return [SCORES[_calls[0] - 1]] * len(rows)


def run_sft(world: World, values: dict[str, Any]) -> Recorder:
    report = Recorder()
    _calls[0] = 0
    sft(validate("sft", values), report)  # type: ignore[arg-type]
    return report


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_policy(tmp_path_factory.mktemp("models") / "base"))


def values_of(folder: Path, init: str, **train: Any) -> dict[str, Any]:
    """Eight steps with a validation after every second one, at one rate, so that fewer steps are the first of more."""
    train = {"epochs": 4, "validate_every": 2, "schedule": "constant", **train}
    values = sft_values(folder, init, **train)
    return changed(values, rollout={"max_new_tokens": 4, "tp_size": 2})


def test_the_best_by_score_is_the_model_of_its_step(two_ranks: WorkerGroup, policy_folder: str, tmp_path: Path) -> None:
    values = values_of(tmp_path, policy_folder, best="score")
    values = changed(values, reward={"init": "tests.rlhf.test_sft:by_the_clock"})
    report = two_ranks.run(run_sft, values, timeout=90)[0]
    scores = [metrics["validation/scores"] for metrics in report.metrics if "validation/scores" in metrics]
    assert scores == SCORES
    run = tmp_path / "sft"
    assert json.loads((run / "best/best.json").read_text()) == {"step": 4, "score": 2.0}
    assert any("the model of step 4" in line for line in report.lines)
    shorter = changed(values, run={"folder": str(tmp_path / "shorter")}, train={"epochs": 2})
    two_ranks.run(run_sft, shorter, timeout=90)
    (best, at_step_4, last) = (weights(folder / "model") for folder in (run / "best", tmp_path / "shorter", run))
    assert best == at_step_4 != last


def test_a_reward_model_s_score_and_a_loss(two_ranks: WorkerGroup, policy_folder: str, tmp_path: Path) -> None:
    """A run that starts again in the folder leaves nothing of the earlier best."""
    values = values_of(tmp_path, policy_folder, best="score")
    values = changed(values, reward={"init": str(save_reward_model(tmp_path / "reward"))})
    by_score = two_ranks.run(run_sft, values, timeout=90)[0].metrics
    scored = {i + 1: m["validation/scores"] for i, m in enumerate(by_score) if "validation/scores" in m}
    found = json.loads((tmp_path / "sft/best/best.json").read_text())
    assert found == {"step": max(scored, key=lambda step: scored[step]), "score": max(scored.values())}
    plain = changed(values_of(tmp_path, policy_folder, epochs=1), data={"validation": []})
    two_ranks.run(run_sft, plain)
    assert not (tmp_path / "sft/best").exists()
    by_loss = two_ranks.run(run_sft, values_of(tmp_path, policy_folder))[0].metrics
    losses = {i + 1: m["loss/validation"] for i, m in enumerate(by_loss) if "loss/validation" in m}
    found = json.loads((tmp_path / "sft/best/best.json").read_text())
    assert found == {"step": min(losses, key=lambda step: losses[step]), "score": -min(losses.values())}
