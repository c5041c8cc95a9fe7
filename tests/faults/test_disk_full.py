"""A disk that fills up while saving: every rank says so and ends, and what was saved before stays."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gearshift.engine.checkpoints.reading import newest
from tests.rlhf.test_resuming import weights
from tests.worker_group import WorkerGroup

from .ranks import run_ranks, said
from .runs import in_folder, small_run, train

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs for the checkpoints, with room for one of them and a part of a second."""
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, two_ranks: WorkerGroup, tmp_path: Path) -> None:
    values: dict[str, Any] = small_run(tmp_path / "data")
    run = small_disk.parent
    start = time.monotonic()
    # Nobody ends the other rank: each ends by itself, well within half a minute of the failure.
    codes = run_ranks(tmp_path, train, in_folder(values, run), alone=30)
    assert codes == [2, 2], said(tmp_path, 0)
    assert time.monotonic() - start < 200
    for rank in (0, 1):
        told = said(tmp_path, rank).strip().splitlines()[-1]
        assert told.startswith(f"{small_disk}/.step-00000002.writing/")
        assert "No space left on device" in told
        needed = int(told.split("a checkpoint takes about ")[1].split(" bytes")[0].replace(",", ""))
        assert MIB // 2 < needed < MIB
    chosen, problems = newest(small_disk, refuse=True)
    assert (chosen.name, problems) == ("step-00000001", [])
    # With room again the run goes on, and ends as one that never stopped.
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert two_ranks.run(train, in_folder(values, run, "auto"), timeout=200)[0].done == 1
    two_ranks.run(train, in_folder(values, tmp_path / "whole"), timeout=200)
    assert weights(run) == weights(tmp_path / "whole")
