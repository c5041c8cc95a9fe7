"""The best model of a supervised run: chosen by loss or by score, kept apart, its state in the checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import World
from gearshift.launch.config import validate
from gearshift.rlhf.best import Best
from gearshift.rlhf.language import sft
from tests.rlhf.test_language import sft_values
from tests.rlhf.test_resuming import weights
from tests.rlhf.tiny import Recorder, changed, save_policy, save_reward_model
from tests.worker_group import WorkerGroup

SCORES = [0.5, 2.0, -1.0, 1.0]
_calls = [0]


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
    values = values_of(tmp_path, policy_folder, best="score", pack=True)
    values = changed(values, reward={"init": "tests.rlhf.test_best:by_the_clock"})
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


def test_what_is_kept_must_be_what_the_checkpoint_says(tmp_path: Path) -> None:
    """Else the best model is looked for anew: after a kill behind a later best one, in another folder, a torn file."""
    world, report, saved = World(0, 1, 0, 1, torch.device("cpu")), Recorder(), list[str]()

    def save(folder: str) -> None:
        Path(folder).mkdir(exist_ok=True)
        saved.append(folder)

    def best(resumes: bool) -> Best:
        return Best(str(tmp_path), world, report, save, resumes=resumes)

    run = best(False)
    assert [run.offer(step, score) for step, score in enumerate([-3.0, -2.0, -2.0, float("nan")], 1)] == [
        True, True, False, False,
    ]  # fmt: skip
    state = run.state()
    assert (state, len(saved)) == ({"step": 2, "score": -2.0}, 2)
    resumed = best(True)
    resumed.set_state(state)
    assert (resumed.step, resumed.offer(3, -2.5)) == (2, False)
    run.offer(5, -1.0)  # later than the checkpoint that is resumed from
    resumed = best(True)
    resumed.set_state(state)
    assert resumed.step is None
    assert resumed.offer(3, -2.5)
    (tmp_path / "best/best.json").write_text('{"step": 3, "sc')
    resumed.set_state(state)
    assert [line for line in report.lines if "looked for anew" in line] == report.lines
    assert len(report.lines) == 2
    best(False)
    assert not (tmp_path / "best").exists()
