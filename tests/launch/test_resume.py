"""--resume before any process starts, and what a resumed run does to the files of its folder."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from gearshift.engine.checkpoints import files
from gearshift.engine.checkpoints.manifest import NAME, Manifest
from gearshift.engine.checkpoints.reading import steps
from gearshift.errors import UserError
from gearshift.launch.config import load
from gearshift.launch.overrides import parse_arguments
from gearshift.launch.progress import Progress
from gearshift.launch.tracking import Tracker
from tests.engine.checkpoints.steps import flip, write_step

from .conftest import example, write
from .test_tracking import read

CHECKPOINTS = Path("runs/ppo/checkpoints")


def config_of(**checkpoint: Any) -> str:
    return write({**example("ppo"), "checkpoint": checkpoint})


def saved_step(step: int, **run: Any) -> Path:
    """A step of the example's run."""
    values = example("ppo")
    config = load("ppo", write({**values, "run": {**values["run"], **run}}, "saved.yaml"))
    folder = write_step(CHECKPOINTS, step)
    manifest = Manifest.read(folder)
    manifest = dataclasses.replace(manifest, world_size=2, config=config.model_dump(mode="json"))
    files.write_text(folder / NAME, manifest.text())
    return folder


def problem(config: str, resume: str | None) -> str:
    overrides = [("checkpoint.resume", resume)] if resume else []
    try:
        load("ppo", config, overrides, ranks=2)
    except UserError as error:
        return str(error)
    return ""


def test_the_option_is_the_setting(here: Path) -> None:
    arguments = parse_arguments(["c.yaml", "--resume", "auto", "--ppo.clip=0.1"])
    assert arguments.overrides == [("checkpoint.resume", "auto"), ("ppo.clip", "0.1")]
    config: Any = load("ppo", config_of(), [("checkpoint.resume", "never")])
    assert not config.checkpoint.resumes


def test_nothing_to_resume_from(here: Path) -> None:
    config = config_of()
    assert problem(config, None) == ""
    told = problem(config, "auto")
    assert told.startswith("command line: checkpoint.resume: auto, but runs/ppo/checkpoints holds no checkpoint")
    assert "elsewhere is no checkpoint" in problem(config, "elsewhere")


def test_checkpoints_of_an_earlier_run_are_not_left_behind_unasked(here: Path) -> None:
    saved_step(5)
    config = config_of()
    assert "runs/ppo/checkpoints holds checkpoints of an earlier run: go on with --resume auto" in problem(config, None)
    assert problem(config, "never") == ""
    assert problem(config, "auto") == ""
    assert problem(config, str(CHECKPOINTS / "step-00000005")) == ""


def test_a_finished_run_may_be_gone_on_with(here: Path) -> None:
    saved_step(5)
    (CHECKPOINTS.parent / "model").mkdir()
    assert "holds a finished run" in problem(config_of(), "never")
    assert problem(config_of(), "auto") == ""


def test_another_run_is_refused_and_a_damaged_manifest_passed_over(here: Path) -> None:
    saved_step(5)
    last = saved_step(10, seed=7)
    assert "run.seed: 0, but the checkpoint was made with 7" in problem(config_of(), "auto")
    flip(last / NAME)
    assert problem(config_of(), "auto") == ""  # the ranks tell it, and take step 5
    assert "manifest.json: is damaged" in problem(config_of(), str(last))


def test_a_step_of_another_folder_goes_where_no_others_are(here: Path) -> None:
    """Beside newer steps of another run its own would be removed as old ones, or taken for theirs."""
    there = saved_step(5)
    other = Path("elsewhere") / there.name
    shutil.copytree(there, other)
    assert "holds checkpoints of another run than" in problem(config_of(), str(other))
    shutil.rmtree(CHECKPOINTS)
    assert problem(config_of(), str(other)) == ""


def test_a_step_keeps_its_name(here: Path) -> None:
    step = saved_step(5)
    renamed = step.rename(step.with_name("good"))
    assert "good has another name than a step's: call it step-00000005" in problem(config_of(), str(renamed))


def test_state_that_no_checkpoint_would_hold(here: Path) -> None:
    nvme = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}
    config = write({**example("ppo"), "deepspeed": nvme, "ppo": {**example("ppo")["ppo"], "ema": None}})
    assert "checkpoint.every: optimizer state on NVMe lies in files" in problem(config, None)
    load("ppo", config, [("checkpoint.every", "0")], ranks=2)


def test_metrics_go_on_from_the_step_that_is_resumed(here: Path) -> None:
    folder = Path("runs/ppo")
    saved_step(2)
    with Tracker(folder, [], load("ppo", config_of(), [("checkpoint.resume", "never")])) as tracker:
        for step in (1, 2, 3, 4):
            tracker.log(step, {"loss": step})
            tracker.samples(step, [{"prompt": "a"}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed here
    with Tracker(folder, [], load("ppo", config_of(), [("checkpoint.resume", "auto")])) as tracker:
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 5  # until it is known where from
        tracker.keep_until(2)
        tracker.log(3, {"loss": 30})
    assert [row["loss"] for row in read(folder / "metrics.jsonl")] == [1, 2, 30]
    assert [row["step"] for row in read(folder / "samples.jsonl")] == [1, 2]
    assert steps(CHECKPOINTS) == [2]
    Tracker(folder, [], load("ppo", config_of(), [("checkpoint.resume", "never")])).close()
    assert (folder / "metrics.jsonl").read_text() == ""


def test_the_bar_starts_where_the_run_does(capsys: pytest.CaptureFixture[str]) -> None:
    now = iter([0.0, 0.0, 20.0, 40.0])
    with Progress(8, "ppo", done=4, every=10, clock=lambda: next(now, 60.0)) as progress:
        progress.update({})
    assert capsys.readouterr().err == "ppo: step 5/8, 0:00 left\n"
