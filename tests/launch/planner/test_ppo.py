"""A run on paper of two small models: what each phase adds to what is always there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from benchmarks.plan_runs import Size, llama
from gearshift.launch.planner.ppo import Phase, PpoPlan, Shapes

SIZE = Size(
    llama(32, 2, 2, 2, 64), prompt=12, response=20, rollout={"tp_size": 2, "keep_weights": False},
    zero={"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 32,
          "stage3_prefetch_bucket_size": 2000},
)  # fmt: skip


@pytest.fixture(scope="module")
def plan() -> PpoPlan:
    """16 episodes on two ranks, with pretraining text of 64 tokens."""
    shape = AutoConfig.for_model(**SIZE.policy)
    return PpoPlan(SIZE.config(Path("run")), Shapes(shape, shape, shape, shape), 2, 2, torch.float32)


def phases(plan: PpoPlan) -> dict[str, Phase]:
    return {phase.name: phase for phase in plan.phases}


def test_the_one_group_answers_every_prompt(plan: PpoPlan) -> None:
    assert (plan.rollouts.rows, plan.rollouts.slots) == (16, 16)
    assert plan.changed(rollout={"tp_size": 1}).rollouts.rows == 8
    assert plan.rollout.parts["episodes"] == 16 * 20 * (8 + 4 + 4)


def test_the_longest_text_is_trained_on(plan: PpoPlan) -> None:
    assert plan.text is not None
    assert (plan.text.rows, plan.text.width, plan.text.targets) == (4, 64, 63)
    found = phases(plan)
    assert found["train: policy, pretraining text"].parts["activations"] > found["train: policy"].parts["activations"]


def test_every_rank_holds_all_episodes(plan: PpoPlan) -> None:
    assert plan.episodes == 16 * (20 * (9 * 5) + 12 * 8)


def test_a_step_lets_go_of_the_weights_that_are_kept_whole(plan: PpoPlan) -> None:
    held = plan.holdings
    everything = sum(h.weights + h.whole for h in held.values())
    assert held["policy"].whole > 0
    assert phases(plan)["step: policy"].parts["weights"] == everything - held["policy"].whole


def test_what_the_critic_left_gathered_lies_beside_the_policy(plan: PpoPlan) -> None:
    """The critic's values come last before the policy trains: its layers were fetched ahead for a backward pass."""
    found = phases(plan)
    assert found["step: policy"].parts["gathered"] > 0
    assert found["step: critic"].parts["gathered"] == 0


def test_gradients_that_fit_into_the_bucket_are_there_while_their_model_trains(plan: PpoPlan) -> None:
    """The sums of all shards until the last micro-batch is through, then the rank's own; two losses are two of them."""
    summed = plan.with_deepspeed({"zero_optimization": {"reduce_bucket_size": 10**6}})
    policy, found = summed.holdings["policy"], phases(summed)
    assert policy.passing
    assert summed.rollout.parts["gradients"] == found["score: reference"].parts["gradients"] == 0
    gradients = {name: (found[name].parts["gradients"], found[name].parts["buckets"]) for name in found}
    assert gradients["train: policy"] == (0, policy.bucket)
    assert gradients["train: policy, pretraining text"] == (policy.gradients, policy.bucket)
    assert gradients["step: policy"] == (policy.gradients, 0)
    assert gradients["train: critic"] == (0, summed.holdings["critic"].bucket)


def test_one_rank_reads_its_weights_where_they_are(plan: PpoPlan) -> None:
    one = replace(plan.changed(rollout={"tp_size": 1}), ranks=1, per_host=1)
    assert one.rollout.parts["rollout weights"] == 0
    away = one.with_deepspeed({"zero_optimization": {"offload_param": {"device": "cpu"}}})
    assert away.rollout.parts["rollout weights"] == one.replica.weights > 0


def test_the_buffers_of_a_shift_are_there_in_rollouts_alone_or_always(plan: PpoPlan) -> None:
    kept = plan.changed(rollout={"keep_weights": True})
    bucket = sum(held.bucket for held in plan.holdings.values())
    for one, expected in ((plan, 0), (kept, plan.buffers)):
        assert one.rollout.parts["buckets"] == bucket + plan.buffers
        assert phases(one)["train: critic"].parts["buckets"] == bucket + expected
    assert phases(plan)["train: critic"].parts["rollout weights"] == 0
    assert phases(kept)["train: critic"].parts["rollout weights"] == plan.replica.weights


def test_the_buffers_are_counted_in_bytes(plan: PpoPlan) -> None:
    assert replace(plan, dtype=torch.bfloat16, _models={}).buffers == plan.buffers // 2 > 0


def test_the_policys_optimizer_may_be_on_the_host_in_rollouts(plan: PpoPlan) -> None:
    aside, policy, critic = (
        plan.changed(rollout={"offload_optimizer": True}), plan.holdings["policy"], plan.holdings["critic"],
    )  # fmt: skip
    assert aside.rollout.parts["optimizer"] == critic.optimizer
    assert plan.rollout.parts["optimizer"] == critic.optimizer + policy.optimizer + policy.average
    assert (plan.host_bytes, aside.host_bytes) == (0, policy.optimizer + policy.average)
