"""Every kind of damage to every file is named, and the step before is used or nothing is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gearshift.engine.checkpoints.manifest import NAME, Manifest
from gearshift.engine.checkpoints.reading import POINTER, newest, pointer_problem, step_problems, steps
from gearshift.errors import UserError

from .steps import CONTENT, DAMAGES, flip, manifest, write_step


def test_a_manifest_reads_back_as_it_was(tmp_path: Path) -> None:
    written = manifest(7, score=0.1 + 0.2)
    (tmp_path / NAME).write_text(written.text())
    assert Manifest.read(tmp_path) == written


def test_every_flipped_bit_of_a_manifest_is_seen(tmp_path: Path) -> None:
    path = tmp_path / NAME
    whole = manifest(7).text().encode()
    for at in range(len(whole)):
        path.write_bytes(whole)
        flip(path, at)
        with pytest.raises(UserError, match=r"manifest\.json: (is damaged|has format)"):
            Manifest.read(tmp_path)


def test_the_newest_whole_step(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write_step(tmp_path, step)
    assert steps(tmp_path) == [5, 10, 15]
    assert newest(tmp_path) == (tmp_path / "step-00000015", [])
    # Between the rename and the move of the pointer: nothing is wrong.
    (tmp_path / POINTER).write_text("step-00000010\n")
    assert newest(tmp_path, refuse=True) == (tmp_path / "step-00000015", [])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*CONTENT, NAME])
def test_a_damaged_file_is_named_and_the_step_before_used(tmp_path: Path, name: str, damage: str) -> None:
    before, last = write_step(tmp_path, 5), write_step(tmp_path, 10)
    DAMAGES[damage](last / name)
    chosen, problems = newest(tmp_path)
    assert chosen == before
    assert len(problems) == 1
    assert problems[0].startswith(f"{last / name}: is {'missing' if damage == 'deleted' else 'damaged'}")
    with pytest.raises(UserError, match=name):
        newest(tmp_path, refuse=True)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pointer_is_named(tmp_path: Path, damage: str) -> None:
    write_step(tmp_path, 5)
    last = write_step(tmp_path, 10)
    DAMAGES[damage](tmp_path / POINTER)
    chosen, problems = newest(tmp_path)
    assert chosen == last
    assert len(problems) == 1
    assert problems[0].startswith(f"{tmp_path / POINTER}: ")
    with pytest.raises(UserError, match=POINTER):
        newest(tmp_path, refuse=True)


def test_a_pointer_at_a_step_that_is_gone(tmp_path: Path) -> None:
    write_step(tmp_path, 5)
    shutil.rmtree(write_step(tmp_path, 10))
    assert pointer_problem(tmp_path) == f"{tmp_path / POINTER}: names step-00000010, which is not there"


def test_nothing_whole_is_an_error_not_a_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no whole checkpoint to resume from"):
        newest(tmp_path / "none")
    only = write_step(tmp_path, 5)
    flip(only / "critic/a.pt")
    with pytest.raises(UserError, match=r"there is no whole checkpoint to resume from: .*critic/a\.pt: is damaged"):
        newest(tmp_path)


def test_a_torn_pair_is_refused(tmp_path: Path) -> None:
    """The policy's folder of step 10 with the critic's of step 5."""
    older, last = write_step(tmp_path, 5), write_step(tmp_path, 10)
    shutil.rmtree(last / "critic")
    shutil.copytree(older / "critic", last / "critic")
    assert newest(tmp_path)[0] == older
    assert [problem.split(": ")[0] for problem in step_problems(last)] == [str(last / "critic/a.pt")]


def test_a_file_that_nobody_wrote_is_refused(tmp_path: Path) -> None:
    """DeepSpeed looks for its files by a pattern: one more would be read."""
    step = write_step(tmp_path, 5)
    (step / "policy/zero_pp_rank_0_mp_rank_01_model_states.pt").write_text("more")
    assert "is not in manifest.json" in step_problems(step)[0]


def test_ranks_share_the_reading(tmp_path: Path) -> None:
    step = write_step(tmp_path, 5)
    for name in CONTENT:
        flip(step / name)
    parts = [step_problems(step, part, 3) for part in range(3)]
    assert sorted(problem for part in parts for problem in part) == sorted(step_problems(step))
    assert [len(part) for part in parts] == [2, 1, 1]
