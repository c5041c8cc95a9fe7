"""SIGKILL at the write points of a save, between shard and commit, in rollout and update: nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gearshift.engine.checkpoints.manifest import Manifest
from gearshift.engine.checkpoints.reading import POINTER, newest, pointer_problem, step_problems
from tests.rlhf.test_resuming import weights
from tests.rlhf.tiny import changed
from tests.worker_group import WorkerGroup

from .ranks import run_ranks, said
from .runs import in_folder, small_run, train, train_killed_at, train_killed_in, train_noted

# Of operations on files that are much alike each so-manieth is a point to be killed at, and every one of the pointer's.
STRIDE = int(os.environ.get("STRIDE", "3"))


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return small_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts; its operations during the second save are noted."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_ranks(folder, train_noted, in_folder(values, folder / "run"), 2, folder) == [0, 0], said(folder, 0)
    return folder


@pytest.fixture(scope="module")
def first_step(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder as it is after the first iteration."""
    folder = tmp_path_factory.mktemp("first")
    killed = train_killed_in, in_folder(values, folder / "run"), 0, "Ppo.iteration", 1
    assert -signal.SIGKILL in run_ranks(folder, *killed)
    return folder / "run"


def operations(whole: Path, rank: int) -> list[str]:
    """Of the second save alone, with what is removed after it: until the third save begins."""
    lines = (whole / f"operations-{rank}").read_text().splitlines()
    third = next(n for n, line in enumerate(lines) if "step-00000003" in line)
    # The third save first looks at its folder's parent.
    return lines[: third - 1] if lines[third - 1].startswith("folder") else lines[:third]


def check_folder(checkpoints: Path) -> None:
    """The pointer names a whole step, and so does the newest."""
    assert pointer_problem(checkpoints) is None
    assert step_problems(checkpoints / (checkpoints / POINTER).read_text().strip()) == []
    assert newest(checkpoints, refuse=True)[1] == []


def digests(checkpoints: Path) -> str:
    """Of every file of the newest step, and the state in its manifest."""
    manifest = Manifest.read(newest(checkpoints)[0])
    return json.dumps([manifest.files, manifest.state, manifest.step], sort_keys=True)


def resume(two_ranks: WorkerGroup, values: dict[str, Any], run: Path) -> int:
    """Goes on to the end; returns the step that it went on from."""
    return int(two_ranks.run(train, in_folder(values, run, "auto"), timeout=200)[0].done)


def test_killed_at_write_points(
    two_ranks: WorkerGroup, values: dict[str, Any], whole: Path, first_step: Path, tmp_path: Path
) -> None:
    """Of the second save, on either rank: from the first folder to the last file of the first step's removal
    (`make test-kills`: every one).

    What a run goes on from is the newest step's files: where their digests are those of an earlier point, so is its
    end, and the run is not repeated.
    """
    expected, found = weights(whole / "run"), Counter[int]()
    gone_on: dict[str, int] = {}
    for rank in (0, 1):
        points = operations(whole, rank)
        assert len(points) > 14
        for count, point in enumerate(points):
            if count % STRIDE != rank % STRIDE and POINTER not in point:
                continue
            run = tmp_path / f"{rank}-{count}"
            shutil.copytree(first_step, run)
            codes = run_ranks(run, train_killed_at, in_folder(values, run, "auto"), rank, 2, count)
            assert codes[rank] == -signal.SIGKILL, f"{point}: {said(run, rank)}"
            check_folder(run / "checkpoints")
            state = digests(run / "checkpoints")
            if state not in gone_on:
                gone_on[state] = resume(two_ranks, values, run)
                assert weights(run) == expected, f"killed before {point!r} on rank {rank}"
            found[gone_on[state]] += 1
            shutil.rmtree(run)
    assert sum(found.values()) > 60 // STRIDE
    assert sorted(gone_on.values()) == [1, 2]


def test_killed_while_it_is_written_in_the_background(
    two_ranks: WorkerGroup, values: dict[str, Any], whole: Path, first_step: Path, tmp_path: Path
) -> None:
    """At every ninth write point of the second save, which the third iteration runs beside."""
    values = changed(values, checkpoint={"background": True})
    gone_on: dict[str, int] = {}
    for number, rank in enumerate((0, 1)):
        for count in range(4 * number, len(operations(whole, rank)), 9):
            run = tmp_path / f"{rank}-{count}"
            shutil.copytree(first_step, run)
            codes = run_ranks(run, train_killed_at, in_folder(values, run, "auto"), rank, 2, count)
            assert codes[rank] == -signal.SIGKILL, said(run, rank)
            check_folder(run / "checkpoints")
            state = digests(run / "checkpoints")
            if state not in gone_on:
                gone_on[state] = resume(two_ranks, values, run)
                assert weights(run) == weights(whole / "run"), f"killed before operation {count} of rank {rank}"
    assert sorted(gone_on.values()) == [1, 2]


@pytest.mark.parametrize(
    ("where", "count", "rank", "done"),
    [
        ("Checkpoints._commit", 1, 0, 1),  # every shard is written, nothing is committed
        ("Checkpoints._gathered", 4, 1, 1),  # this rank's shards are written: the others wait for it
        ("HybridEngine._bring", 1, 0, 1),  # before the second rollout
        ("Ppo.held_against_reference", 1, 1, 1),  # after it
        ("HybridEngine.step", 6, 0, 1),  # four steps an iteration: between the epochs of the second
    ],
)
def test_killed_elsewhere(
    two_ranks: WorkerGroup, values: dict[str, Any], whole: Path, tmp_path: Path, where: str, count: int, rank: int,
    done: int,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    codes = run_ranks(tmp_path, train_killed_in, in_folder(values, run), rank, where, count)
    assert codes[rank] == -signal.SIGKILL
    check_folder(run / "checkpoints")
    assert resume(two_ranks, values, run) == done
    assert weights(run) == weights(whole / "run")
