"""The shift and the rollouts on four ranks: two replicas of two ranks each, and one of four."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import Rollouts, Sampling, Training, World
from tests.engine.test_hybrid import _check_against_transformers, nll, roll_train_roll, sample_with, some_prompts
from tests.engine.test_hybrid import _policy as policy_of
from tests.models import save_tiny
from tests.worker_group import WorkerGroup


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("tp_size", [2, 4])
def test_rollout_agrees_with_training_and_transformers(
    four_ranks: WorkerGroup, tmp_path: Path, family: str, tp_size: int
) -> None:
    """With fewer key/value heads than ranks too (llama has two, qwen3 one)."""
    folder = save_tiny(family, tmp_path / family)
    ranks = four_ranks.run(roll_train_roll, str(folder), tp_size)
    for found in ranks:
        assert max(found["gaps"]) <= 1e-5
        assert found["shards_same"] == [True, True]
        assert found["replica_same"] == [True, True]
    _check_against_transformers(folder, [found["rollouts"][0] for found in ranks])


def test_the_same_draw_gets_the_same_answer(four_ranks: WorkerGroup, two_ranks: WorkerGroup, tmp_path: Path) -> None:
    """Whatever the tensor-parallel degree, the number of replicas and of ranks."""
    folder = str(save_tiny("llama", tmp_path / "llama"))

    def rows(parts: list[Rollouts]) -> list[list[int]]:
        assert [int(i) for r in parts for i in r.ids] == list(range(9))
        return [r.responses[b][r.mask[b]].tolist() for r in parts for b in range(len(r))]

    answers = [rows(four_ranks.run(sample_with, folder, tp_size, 2, 1.0)) for tp_size in (1, 2, 4)]
    answers.append(rows(two_ranks.run(sample_with, folder, 2, None, 1.0)))
    assert all(answer == answers[0] for answer in answers)


def alternate(world: World, folder: str, times: int) -> dict[str, Any]:
    """Rollouts and training steps in turn; the bytes that tensors hold after two turns and at the end."""
    import gc

    policy = policy_of(world, folder, 2, Training(learning_rate=1e-3))
    mine = some_prompts(8).select(world.share(8))
    found: dict[str, Any] = {"gaps": [], "shards_same": True, "bytes": []}
    for turn in range(times):
        before = [p.ds_tensor.clone() for p in policy.module.parameters()]
        with policy.rollout() as generator:
            rollouts = generator.generate(mine, Sampling(8, eos_ids=(2,), seed=turn))
        after = (p.ds_tensor for p in policy.module.parameters())
        found["shards_same"] &= all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        gap = (policy.logprobs(rollouts) - rollouts.logprobs) * rollouts.mask
        found["gaps"].append(gap.abs().max().item())
        policy.accumulate(nll, rollouts)
        policy.step()
        if turn in (1, times - 1):
            del rollouts, before, after, gap
            gc.collect()
            storages = {
                o.untyped_storage().data_ptr(): o.untyped_storage().nbytes()
                for o in gc.get_objects() if issubclass(type(o), torch.Tensor)
            }  # fmt: skip
            found["bytes"].append(sum(storages.values()))
    return found


def test_twenty_alternations_leave_nothing_behind(four_ranks: WorkerGroup, tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama"))
    for found in four_ranks.run(alternate, folder, 20):
        assert found["shards_same"]
        assert max(found["gaps"]) <= 1e-5
        early, late = found["bytes"]
        assert abs(late - early) < 1024  # scalars come and go; one kept row of a rollout would be more
