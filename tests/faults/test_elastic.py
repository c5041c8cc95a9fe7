"""A run that goes on with other ranks, and other tensor-parallel groups of them, is the same run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import Episodes, World
from gearshift.engine.checkpoints.reading import steps
from gearshift.rlhf.ppo import Ppo
from tests.rlhf.tiny import changed

from .ranks import run_ranks, said
from .runs import BATCH, small_run, train

ITERATIONS = 4
FIELDS = ("logprobs", "ref_logprobs", "advantages", "returns", "values", "rewards", "kl")
# Sums over ranks and micro-batches are rounded in another order; Adam's first steps enlarge what that does to weights.
BOUND = 2e-4
# Of what one iteration takes, how fast it was and how much the rollout's and the training's rounding differ.
OTHERWISE = ("timing/", "throughput/", "memory/", "rollout/logprob_gap")


def noted(world: World, values: dict[str, Any], out: Path) -> None:
    """Trains, and leaves each iteration's episodes and metrics in `out`."""
    check = Ppo.check_finite

    def keep(self: Ppo, episodes: Episodes, number: int) -> None:
        found = {f.name: getattr(episodes, f.name) for f in dataclasses.fields(episodes)}
        torch.save(found, out / f"{number}-{world.rank}.pt")
        check(self, episodes, number)

    Ppo.check_finite = keep  # type: ignore[method-assign]
    report = train(world, values)
    for number, row in enumerate(report.metrics, report.done + 1):
        if world.rank == 0:
            torch.save(row, out / f"metrics-{number}.pt")


def run(values: dict[str, Any], out: Path, ranks: int, tp_size: int, iterations: int, start: Path | None) -> Path:
    """The run's folder."""
    out.mkdir()
    values = changed(
        values,
        run={"folder": str(out / "run")},
        rollout={"tp_size": tp_size},
        ppo={"episodes": iterations * BATCH},
        checkpoint={"keep": ITERATIONS, "resume": str(start) if start else None},
    )
    assert run_ranks(out, noted, values, out, size=ranks) == [0] * ranks, [said(out, rank) for rank in range(ranks)]
    return out / "run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """whole: two ranks, all iterations. chain-4, chain-2, chain-1: one iteration each, by so many ranks."""
    folder = tmp_path_factory.mktemp("elastic")
    values = small_run(folder / "data")
    values = changed(values, ppo={"kl": {"coef": 0.1, "target": 0.05, "horizon": 10 * ITERATIONS}})
    last = run(values, folder / "whole", 2, 2, ITERATIONS, None) / "checkpoints/step-00000001"
    for done, (ranks, tp_size) in enumerate([(4, 4), (2, 1), (1, 1)], 1):
        here = run(values, folder / f"chain-{ranks}", ranks, tp_size, done + 1, last)
        assert steps(here / "checkpoints") == [done + 1]
        last = here / f"checkpoints/step-{done + 1:08d}"
    return folder


def episodes(out: Path, number: int) -> dict[tuple[int, ...], dict[str, torch.Tensor]]:
    """Of all ranks: prompt number and answer -> what each field holds for them, without padding."""
    found = {}
    for path in sorted(out.glob(f"{number}-*.pt")):
        fields = torch.load(path)
        for i, name in enumerate(fields["ids"].tolist()):
            mask = fields["mask"][i].bool()
            answer = name, *fields["responses"][i][mask].tolist()
            found[answer] = {field: fields[field][i][mask] for field in FIELDS}
    return found


@pytest.mark.parametrize(("ranks", "number"), [(4, 2), (2, 3), (1, 4)])
def test_the_iteration_is_that_of_the_run_that_went_on(folder: Path, ranks: int, number: int) -> None:
    """The same prompts get the same answers; values, advantages and losses are the same but for rounding."""
    expected, found = episodes(folder / "whole", number), episodes(folder / f"chain-{ranks}", number)
    assert len(found) == BATCH
    assert sorted(found) == sorted(expected)
    for answer, fields in found.items():
        for field, value in fields.items():
            torch.testing.assert_close(value, expected[answer][field], rtol=BOUND, atol=BOUND)
    before, after = (torch.load(folder / out / f"metrics-{number}.pt") for out in ("whole", f"chain-{ranks}"))
    told = [name for name in before if not name.startswith(OTHERWISE)]
    assert len(told) > 20
    for name in told:
        assert after[name] == pytest.approx(before[name], rel=BOUND, abs=BOUND), name
