"""The planner's figures against a run, and the ready configs: each command of their README says that it fits."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.plan_memory import of_size, peaks
from benchmarks.plan_runs import Size, llama
from gearshift.engine import World
from tests.launch.test_plan import ROOT, ready_commands
from tests.worker_group import WorkerGroup

SMALL = Size(
    llama(192, 3, 6, 2, 3000), prompt=40, response=24, rollout={"tp_size": 2}, zero={"reduce_bucket_size": 10**6}
)


def predicted_and_measured(world: World) -> dict[str, Any]:
    return of_size(SMALL, world)


def test_every_phase_of_a_run_takes_what_was_predicted() -> None:
    group = WorkerGroup(2)
    try:
        found = group.run(predicted_and_measured, timeout=240)[0]
    finally:
        group.stop()
    for name, parts in found["predicted"].items():
        assert sum(parts.values()) == pytest.approx(found["measured"][name], rel=0.1), name
    predicted, measured = peaks(found)
    assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("words", ready_commands(), ids=" ".join)
def test_a_ready_config_fits(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gearshift.launch", "plan", *words],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("fits: ")
    assert done.stderr == ""
