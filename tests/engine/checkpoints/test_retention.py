"""Which steps stay, and that a purge cut short anywhere leaves the newest step whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gearshift.engine.checkpoints import files
from gearshift.engine.checkpoints.reading import newest, steps
from gearshift.engine.checkpoints.retention import best, remove_left_behind, set_aside
from gearshift.engine.checkpoints.retention import purge as rename_old

from .steps import flip, write_step


def purge(folder: Path, keep: int, written: int | None = None) -> None:
    """What a save does after the pointer has moved to the step that it has written, the newest unless another."""
    rename_old(folder, keep, steps(folder)[-1] if written is None else written)
    remove_left_behind(folder)


class Stopped(Exception):
    """Stands for a kill."""


def stopping_at(count: int) -> files.Hook:
    left = iter(range(count))

    def hook(operation: str, path: Path) -> None:
        if next(left, None) is None:
            raise Stopped

    return hook


@pytest.fixture(autouse=True)
def no_hook() -> Iterator[None]:
    yield
    files.hook = None


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step, score in ((5, 0.3), (10, 0.9), (15, None), (20, 0.4), (25, 0.9), (30, 0.1), (35, None)):
        write_step(tmp_path, step, score)
        purge(tmp_path, 2)
    assert best(tmp_path) == 25  # the newer of equal ones
    assert steps(tmp_path) == [25, 30, 35]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", *(f"step-000000{n}" for n in (25, 30, 35))]


def test_one_is_enough_to_keep(tmp_path: Path) -> None:
    write_step(tmp_path, 5)
    write_step(tmp_path, 10)
    purge(tmp_path, 1)
    assert steps(tmp_path) == [10]
    purge(tmp_path, 1)
    assert steps(tmp_path) == [10]


def test_what_was_just_written_stays_whatever_lies_beside_it(tmp_path: Path) -> None:
    for step in (20, 30, 40, 6):
        write_step(tmp_path, step)
    purge(tmp_path, 2, written=6)
    assert steps(tmp_path) == [6, 30, 40]


def test_a_damaged_best_is_not_the_best(tmp_path: Path) -> None:
    flip(write_step(tmp_path, 5, 0.9) / "manifest.json")
    write_step(tmp_path, 10, 0.1)
    assert best(tmp_path) == 10


def test_a_purge_may_stop_anywhere(tmp_path: Path) -> None:
    """After every number of operations: the newest step is found, no other is half there, the next purge ends it."""
    stops = 0
    while True:
        folder = tmp_path / str(stops)
        for step, score in ((5, 0.5), (10, None), (15, None), (20, None)):
            last = write_step(folder, step, score)
        files.hook = stopping_at(stops)
        try:
            purge(folder, 1)
            finished = True
        except Stopped:
            finished = False
        files.hook = None
        assert newest(folder, refuse=True) == (last, [])
        for step in steps(folder):
            assert newest_of(folder, step)
        purge(folder, 1)
        assert steps(folder) == [5, 20]
        if finished:
            break
        stops += 1
    assert stops > 15


def newest_of(folder: Path, step: int) -> bool:
    from gearshift.engine.checkpoints.manifest import folder_name
    from gearshift.engine.checkpoints.reading import step_problems

    return step_problems(folder / folder_name(step)) == []


def test_going_on_from_an_older_step_takes_the_newer_ones_out_of_the_way(tmp_path: Path) -> None:
    chosen = write_step(tmp_path, 5)
    flip(write_step(tmp_path, 10) / "critic/a.pt")
    write_step(tmp_path, 15)
    set_aside(tmp_path, chosen)
    assert newest(tmp_path, refuse=True) == (chosen, [])
    assert (tmp_path / ".step-00000015.aside").is_dir()  # until the run has another step to show
    write_step(tmp_path, 7)
    purge(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005", "step-00000007"]
