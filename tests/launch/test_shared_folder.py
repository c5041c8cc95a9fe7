"""A run folder that not every host sees ends the run before it begins."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from gearshift.errors import Told, UserError
from gearshift.launch.shared_folder import require_shared

HOSTS = ["a", "a", "b"]


def found(folders: list[Path]) -> list[Exception | None]:
    """What each rank raises, whose run folder is the one of `folders`."""
    store = dist.HashStore()

    def look(rank: int) -> Exception | None:
        try:
            require_shared(store, folders[rank], rank, HOSTS, patience=0.5)
        except UserError as error:
            return error
        return None

    with ThreadPoolExecutor(len(folders)) as pool:
        return list(pool.map(look, range(len(folders))))


def test_a_folder_that_all_see(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    assert found([run] * 3) == [None] * 3
    assert list(run.iterdir()) == []


def test_a_folder_that_one_host_does_not_see(tmp_path: Path) -> None:
    run = tmp_path / "here"
    first, *others = found([run, run, tmp_path / "there"])
    assert type(first) is UserError
    assert str(first).startswith(f"run.folder: b does not see {run} of a: every host writes its part of a checkpoint")
    assert [type(other) for other in others] == [Told, Told]
    assert list(run.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first, *others = found([tmp_path / "file" / "run"] * 3)
    assert str(first) == f"run.folder: {tmp_path / 'file' / 'run'}: cannot be written: Not a directory"
    assert [str(other) for other in others] == [str(first)] * 2


def test_a_rank_that_has_ended(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another rank has ended while all looked"):
        require_shared(dist.HashStore(), tmp_path, 1, HOSTS, patience=-14.9)
