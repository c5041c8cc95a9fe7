"""Optimizer state that lies on the host during rollouts: training goes on as if it had stayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.engine import HybridEngine, World
from gearshift.errors import SettingError
from tests.engine.test_hybrid import _policy
from tests.engine.test_shift import policy_of, train
from tests.models import save_tiny
from tests.worker_group import WorkerGroup


def state_of(policy: HybridEngine) -> list[Tensor]:
    """Master weights and moments, as DeepSpeed's optimizer has them."""
    optimizer = policy.engine.optimizer
    moments = [t for state in optimizer.optimizer.state.values() for t in state.values()]
    return [*optimizer.fp32_partitioned_groups_flat, *(t for t in moments if torch.is_tensor(t))]


def trained(world: World, folder: str, offload: bool, dtype: torch.dtype, optimizer: str) -> dict[str, Any]:
    """Weights and optimizer state after three steps, each on what a rollout wrote."""
    policy = policy_of(world, folder, {"sub_group_size": 3000}, optimizer, dtype=dtype, offload_optimizer=offload)
    for turn in range(3):
        train(policy, turn)
    before = [t.data_ptr() for t in state_of(policy)]
    with policy.rollout():
        within = [t.data_ptr() for t in state_of(policy)]
    return {
        "stood_aside": sum(a != b for a, b in zip(before, within, strict=True)),
        "seconds": policy.offload_seconds,
        "state": [t.detach().clone() for t in state_of(policy)],
        "shards": [p.ds_tensor.clone() for p in policy.module.parameters()],
    }


@pytest.mark.parametrize(
    ("dtype", "optimizer"), [(torch.float32, "adamw"), (torch.bfloat16, "adamw"), (torch.bfloat16, "sgd")]
)
def test_training_goes_on_bit_for_bit(
    two_ranks: WorkerGroup, tmp_path: Path, dtype: torch.dtype, optimizer: str
) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama"))
    plain = two_ranks.run(trained, folder, False, dtype, optimizer)
    aside = two_ranks.run(trained, folder, True, dtype, optimizer)
    for stayed, left in zip(plain, aside, strict=True):
        assert stayed["stood_aside"] == 0
        assert stayed["seconds"] == 0 < left["seconds"]
        large = sum(t.numel() > 1 for t in stayed["state"])  # all but the numbers of steps
        masters = 4 if dtype == torch.float32 else 0  # are the weights themselves, which stay
        assert left["stood_aside"] == large - masters >= (4 if optimizer == "sgd" else 8)
        for name in ("state", "shards"):
            assert all(torch.equal(a, b) for a, b in zip(stayed[name], left[name], strict=True))


def an_exception(world: World, folder: str) -> bool:
    """Whether training goes on after a rollout that failed, and its error came through."""
    policy = policy_of(world, folder, offload_optimizer=True)
    train(policy)
    before = [t.detach().clone() for t in state_of(policy)]
    try:
        with policy.rollout():
            raise KeyError("in the rollout")
    except KeyError:
        same = all(torch.equal(a, b) for a, b in zip(before, state_of(policy), strict=True))
    train(policy, 1)
    return same and policy._optimizer_state._aside == []  # type: ignore[union-attr]


def test_an_exception_brings_it_back(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    assert all(two_ranks.run(an_exception, str(save_tiny("llama", tmp_path / "llama"))))


def without_optimizer(world: World, folder: str) -> float:
    policy = _policy(world, folder, 1, offload_optimizer=True)
    with policy.rollout():
        pass
    return policy.offload_seconds


def test_a_frozen_model_has_nothing_to_move(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    assert two_ranks.run(without_optimizer, str(save_tiny("llama", tmp_path / "llama"))) == [0.0, 0.0]


def refused(world: World, folder: str, zero: dict[str, Any], offload: bool) -> str:
    try:
        policy_of(world, folder, zero, offload_optimizer=offload)
    except SettingError as error:
        return str(error)
    return "built"


def test_what_is_on_the_host_at_all_times_cannot_move_there(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama"))
    for message in two_ranks.run(refused, folder, {"offload_optimizer": {"device": "cpu"}}, True):
        assert message.startswith("rollout.offload_optimizer: deepspeed.zero_optimization.offload_optimizer keeps")


@pytest.mark.parametrize(
    ("zero", "problem"),
    [
        ({"zero_hpz_partition_size": 2}, "zero_hpz_partition_size: rollouts do not support a second partition (hpZ)"),
        ({"mics_shard_size": 1}, "mics_shard_size: rollouts do not support weights cut over some ranks only (MiCS)"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights: rollouts do not support quantized weights"),
        ({"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights: rollouts do not"),
        ({"offload_param": {"device": "nvme"}}, "offload_param: rollouts do not support weights on NVMe"),
    ],
)
def test_unknown_ways_of_sharding_are_refused(
    two_ranks: WorkerGroup, tmp_path: Path, zero: dict[str, Any], problem: str
) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama"))
    for message in two_ranks.run(refused, folder, zero, False):
        assert message.startswith(f"deepspeed.zero_optimization.{problem}")
