"""Ways of PPO that are not the paper's: no critic, the training forward's log-probs, early ends, odd answers."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import Episodes, Rollouts, World
from gearshift.engine.generator import Generator
from tests.rlhf.test_ppo import build, run_ppo, two_iterations_values
from tests.rlhf.tiny import changed
from tests.worker_group import WorkerGroup


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return two_iterations_values(tmp_path_factory.mktemp("ppo"))


def test_without_a_critic(two_ranks: WorkerGroup, values: dict[str, Any], tmp_path: Path) -> None:
    """GRPO: four answers to a prompt, the penalty in the loss; no critic is loaded or saved, the best model is kept."""
    run = {"folder": str(tmp_path / "run")}
    kl = {"coef": 0.3, "where": "loss", "estimator": "k3"}
    values = changed(values, run=run, ppo={"advantage": "grpo", "answers": 4, "kl": kl, "ema": 0.5})
    values = changed(values, ptx={"coef": 0.0, "data": []})
    found = two_ranks.run(run_ppo, values, timeout=90)[0].metrics
    assert all(math.isfinite(value) for metrics in found for value in metrics.values())
    critics = ("critic", "loss/value", "optimizer/critic")
    assert [name for metrics in found for name in metrics if name.startswith(critics)] == []
    assert not (tmp_path / "run/critic").exists()
    best = json.loads((tmp_path / "run/best/best.json").read_text())
    assert best["score"] == max(metrics["validation/scores"] for metrics in found)
    assert (tmp_path / "run/best/model/model.safetensors").is_file()


def test_training_logprobs_and_an_update_that_stops(
    two_ranks: WorkerGroup, values: dict[str, Any], tmp_path: Path
) -> None:
    """The critic alone in the first iteration; in the second the policy stops after a minibatch and the critic goes
    on. Log-probs of the training forward, weighed, are the rollout's up to rounding, so that the ratio starts at 1."""
    more = {
        "critic_iterations": 1,
        "stop": {"approx_kl": 1e-9},
        "epochs": 2,
        "minibatches": 4,
        "old_logprobs": "training",
        "importance_cap": 2.0,
        "dual_clip": 3.0,
        "whiten_rewards": True,
        "scores": {"missing_eos_penalty": 1.0, "normalize": True, "clip": 2.0},
        "warmup_iterations": 0,
        "kl": {"coef": 0.1, "target": 6.0},
    }
    values = changed(values, run={"folder": str(tmp_path / "run")}, ppo=more)
    first, second = two_ranks.run(run_ppo, values, timeout=90)[0].metrics
    assert [metrics["policy/updates"] for metrics in (first, second)] == [0, 2]
    assert "val/ratio" not in first
    assert second["objective/kl_coef"] == 0.1, "nothing to steer while the policy stands still"
    assert second["val/ratio"] == pytest.approx(1.0, abs=0.05)
    assert abs(second["objective/kl"]) < 1e-4, "the policy had not moved when it wrote"
    assert second["loss/value_avg"] != first["loss/value_avg"]
    assert max(metrics["rollout/logprob_gap"] for metrics in (first, second)) <= 1e-5
    assert 0 < second["policy/entropy_avg"] < math.log(261)


def test_a_run_ends_when_the_entropy_is_spent(two_ranks: WorkerGroup, values: dict[str, Any], tmp_path: Path) -> None:
    values = changed(values, run={"folder": str(tmp_path / "run")}, ppo={"stop": {"entropy": 1e6}})
    report = two_ranks.run(run_ppo, values, timeout=90)[0]
    assert len(report.metrics) == 1
    assert "validation/scores" in report.metrics[0]
    assert any(re.match(r"ppo\.stop\.entropy: \d.* the run ends here", line) for line in report.lines)
    assert (tmp_path / "run/model/model.safetensors").is_file()


def test_answers_at_the_edges(two_ranks: WorkerGroup, values: dict[str, Any], tmp_path: Path) -> None:
    """Every answer ends at once, or none does; all rewards equal; one rank's answers without any token: losses are
    finite and no rank waits for another."""
    every_token = list(range(261))
    for name, eos, masked in (("at-once", every_token, False), ("never", [], False), ("masked", every_token, True)):
        edge = changed(
            values,
            run={"folder": str(tmp_path / name)},
            reward={"init": "tests.rlhf.test_ppo_ways:constant"},
            critic={"init": values["policy"]["init"]},
            ppo={"validate_every": 0},
        )
        for metrics, lengths in two_ranks.run(one_iteration, edge, eos, masked, timeout=90):
            assert all(math.isfinite(value) for value in metrics.values()), name
            assert metrics["objective/scores_std"] == 0.0
            assert metrics["rollout/finished"] == (0.0 if name == "never" else 1.0)
            assert set(lengths) == {"at-once": {1}, "never": {6}, "masked": {0, 1}}[name]


def constant(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    return [0.25] * len(prompts)


def one_iteration(
    world: World, values: dict[str, Any], eos: list[int], masked: bool
) -> tuple[dict[str, float], list[int]]:
    """`masked`: rank 0's answers lose their tokens. Also how long the answers of both ranks were."""
    run, lengths = build(world, values), []
    run.sampling = dataclasses.replace(run.sampling, eos_ids=tuple(eos))
    check = run.check_finite

    def keep(episodes: Episodes, number: int) -> None:
        lengths.extend(episodes.mask.sum(1).tolist())
        check(episodes, number)

    def generate(self: Generator, *args: Any) -> Rollouts:
        rollouts = whole(self, *args)
        if not masked or world.rank:
            return rollouts
        none = torch.zeros_like(rollouts.mask)
        return dataclasses.replace(
            rollouts, mask=none, logprobs=rollouts.logprobs * 0, responses=rollouts.responses * 0
        )

    whole, Generator.generate = Generator.generate, generate  # type: ignore[method-assign]
    run.check_finite = keep  # type: ignore[method-assign]
    try:
        return run.iteration(1), lengths
    finally:
        Generator.generate = whole  # type: ignore[method-assign]
