"""The moving average of weights under ZeRO-3: equal to that of whole weights, and in place only for a while."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.engine import HybridEngine, TokenBatch, Training, World
from gearshift.engine.checkpoints.shards import Shards
from gearshift.engine.saving import gathered_parameters
from gearshift.engine.zero import ZeroModel
from gearshift.kernels import Loss
from tests.models import save_tiny
from tests.worker_group import WorkerGroup

DECAY, STEPS = 0.9, 20


def policy_of(
    world: World, folder: str, dtype: torch.dtype = torch.float32, average: float | None = DECAY
) -> HybridEngine:
    training = Training(learning_rate=1e-2, average=average)
    return HybridEngine.load(folder, world, dtype=dtype, micro_batch_size=2, training=training, tp_size=2)


def loss(model: Any, batch: TokenBatch, count: Tensor) -> Loss:
    logprobs, _ = model.forward(batch.tokens, batch.targets)
    return Loss(-logprobs.sum() / count, {})


def train(policy: ZeroModel, steps: int, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(3, 60, (2, 9), generator=g)
        policy.accumulate(loss, TokenBatch(tokens[:, :-1], tokens[:, 1:]))
        policy.step()


def masters(policy: ZeroModel) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).clone() for name, p in policy.module.named_parameters()}


def weights(policy: ZeroModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in gathered_parameters(policy.module)}


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def averaged_beside_whole_weights(world: World, folder: str, dtype: torch.dtype) -> list[tuple[str, bool]]:
    policy = policy_of(world, folder, dtype)
    mean = masters(policy)
    for step in range(STEPS):
        train(policy, 1, step)
        mean = {name: mean[name].lerp(now, 1 - DECAY) for name, now in masters(policy).items()}
    before = weights(policy)
    with policy.averaged():
        within = weights(policy)
        with policy.rollout() as generator:
            slices = {name: tensor.clone() for name, tensor in generator._replica.slices.items()}
            cut = policy._replica.layout.splits  # type: ignore[union-attr]
            shifted = {name: cut[name].cut(within[name], policy.group.rank) for name in slices}
    with policy.rollout() as generator:
        raw = {name: cut[name].cut(before[name], policy.group.rank) for name in slices}
        back = same(raw, {name: tensor.clone() for name, tensor in generator._replica.slices.items()})
    return [
        ("the mean of whole weights", same(within, {name: tensor.to(dtype) for name, tensor in mean.items()})),
        ("not the weights themselves", not same(within, before)),
        ("rollouts have the mean", same(slices, shifted)),
        ("then the weights again", same(before, weights(policy)) and back),
        ("the masters untouched", same(before, {name: m.to(dtype) for name, m in masters(policy).items()})),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_average_of_whole_weights(two_ranks: WorkerGroup, tmp_path: Path, dtype: torch.dtype) -> None:
    """Bit for bit after 20 steps, norms that every rank keeps whole among them."""
    folder = save_tiny("llama", tmp_path / "model")
    for found in two_ranks.run(averaged_beside_whole_weights, str(folder), dtype, timeout=60):
        assert [name for name, holds in found if not holds] == []


def saved_and_resumed(world: World, folder: str, out: str) -> tuple[bool, bool, str]:
    policy = policy_of(world, folder)
    train(policy, 3)
    (Path(out) / "policy").mkdir(parents=True, exist_ok=True)
    policy.save_shards(Shards(Path(out)), "policy")
    train(policy, 2, 1)
    with policy.averaged():
        through = weights(policy)
        try:
            policy.step()
            refused = ""
        except RuntimeError as error:
            refused = str(error)
    again = policy_of(world, folder)
    again.load_shards(Shards(Path(out)), "policy")
    train(again, 2, 1)
    with again.averaged():
        resumed = same(through, weights(again))
    without = policy_of(world, folder, average=None)
    train(without, 1)
    with without.averaged():
        return resumed, same(weights(without), masters(without)), refused


def test_it_goes_with_a_checkpoint_and_no_step_is_taken_on_it(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    for resumed, unchanged, refused in two_ranks.run(saved_and_resumed, str(folder), str(tmp_path / "out"), timeout=60):
        assert resumed
        assert unchanged, "without an average the weights are what they are"
        assert "moving average" in refused
