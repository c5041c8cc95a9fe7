"""The shift and the rollouts on four ranks: two replicas of two ranks each, and one of four."""

from pathlib import Path

import pytest

from gearshift.engine import Rollouts
from tests.engine.test_hybrid import _check_against_transformers, roll_train_roll, sample_with
from tests.engine.test_shift import alternate, check_alternation
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


@pytest.mark.parametrize(("family", "tp_size"), [("llama", 1), ("qwen3", 2), ("phi", 4)])
def test_twenty_alternations_leave_nothing_behind(
    four_ranks: WorkerGroup, tmp_path: Path, family: str, tp_size: int
) -> None:
    folder = str(save_tiny(family, tmp_path / family))
    for found in four_ranks.run(alternate, folder, tp_size, 20):
        check_alternation(found)
