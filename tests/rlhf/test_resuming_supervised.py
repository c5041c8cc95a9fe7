"""Pretraining, SFT and reward models that go on from a checkpoint end as they would have ended."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from gearshift.engine import World
from gearshift.engine.checkpoints.manifest import Manifest
from gearshift.engine.checkpoints.reading import steps
from gearshift.engine.zero import ZeroModel
from gearshift.errors import NotFinite, Paused, UserError
from gearshift.launch.config import validate
from gearshift.rlhf.language import pretrain, sft
from gearshift.rlhf.reporting import Report
from gearshift.rlhf.reward import reward
from tests.engine.checkpoints.steps import flip
from tests.rlhf.test_language import MODEL
from tests.rlhf.test_resuming import weights, without_clocks
from tests.rlhf.tiny import SENTENCES, VOCABULARY, Recorder, changed, save_policy, text_rows, write_jsonl
from tests.worker_group import WorkerGroup

STAGES: dict[str, Callable[[Any, Report], None]] = {"pretrain": pretrain, "sft": sft, "reward": reward}
SAVED = 2


def run_stage(world: World, command: str, values: dict[str, Any]) -> Recorder:
    report = Recorder()
    STAGES[command](validate(command, values), report)
    return report


def stage_values(command: str, folder: Path) -> dict[str, Any]:
    text = write_jsonl(folder / "text.jsonl", text_rows(12))
    answers = [{"prompt": text[:9], "completion": text[9:]} for text in SENTENCES]
    pairs = [{"prompt": a["prompt"], "chosen": a["completion"], "rejected": a["completion"][::-1]} for a in answers]
    values: dict[str, Any] = {
        "run": {"folder": str(folder / "run"), "seed": 2},
        "train": {"epochs": 2, "batch_size": 4, "micro_batch_size": 2, "validate_every": 2},
        "optimizer": {"learning_rate": 1e-2},
        "checkpoint": {"every": SAVED, "keep": 9, "background": True},
    }
    if command == "pretrain":
        data = {"train": [text], "validation": [text], "max_tokens": 24}
        return values | {
            "policy": {"init": "config", "config": MODEL},
            "data": {**data, "tokenizer": "train", "vocab_size": VOCABULARY},
        }
    policy = {"init": str(save_policy(folder / "policy"))}
    if command == "sft":
        rows = write_jsonl(folder / "answers.jsonl", answers)
        mixed = {"pretraining_fraction": 0.25, "pretraining": [text]}
        data = {"train": [rows], "validation": [rows], "max_tokens": 48}
        return changed(values | {"policy": policy, "data": data}, train=mixed)
    rows = write_jsonl(folder / "pairs.jsonl", pairs)
    demonstrations = write_jsonl(folder / "answers.jsonl", answers)
    data = {"train": [rows], "validation": [rows], "max_tokens": 48, "demonstrations": [demonstrations]}
    return values | {"policy": policy, "data": data}


@pytest.mark.parametrize("command", STAGES)
def test_a_resumed_stage_is_the_same_stage(two_ranks: WorkerGroup, tmp_path: Path, command: str) -> None:
    (tmp_path / "data").mkdir()
    values = stage_values(command, tmp_path / "data")
    whole = two_ranks.run(run_stage, command, values)[0]
    assert len(whole.metrics) > SAVED
    step = tmp_path / f"data/run/checkpoints/step-{SAVED:08d}"
    again = changed(values, run={"folder": str(tmp_path / "again")}, checkpoint={"resume": str(step), "every": 0})
    for report in two_ranks.run(run_stage, command, again):
        assert report.done == SAVED
        assert without_clocks(report.metrics) == without_clocks(whole.metrics[SAVED:])
    assert weights(tmp_path / "again") == weights(tmp_path / "data/run") != {}
    assert not (tmp_path / "again/checkpoints").exists()
    manifest = Manifest.read(step)
    assert manifest.state["rows"] == SAVED * (3 if command == "sft" else 4)
    assert manifest.score == -whole.metrics[SAVED - 1]["loss/validation"]
    if command == "sft":
        assert manifest.state["best"] == {"step": SAVED, "score": manifest.score}
        assert any(f"the model of step {SAVED} is not in {tmp_path / 'again/best'}" in line for line in report.lines)


def diverging(world: World, values: dict[str, Any], at: int) -> tuple[str, list[int]]:
    """SFT whose loss is not finite in step `at`, right after a save; what it says, and the steps that are there."""
    accumulate, calls = ZeroModel.accumulate, iter(range(1, at))

    def fails(self: ZeroModel, *args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise NotFinite("the loss is nan")
        return accumulate(self, *args, **kwargs)

    ZeroModel.accumulate = fails  # type: ignore[method-assign]
    try:
        sft(validate("sft", values), Recorder())  # type: ignore[arg-type]
    except UserError as error:
        return str(error), steps(Path(values["run"]["folder"]) / "checkpoints")
    finally:
        ZeroModel.accumulate = accumulate  # type: ignore[method-assign]
    return "went on", []


def test_what_was_saved_before_a_loss_that_is_not_finite_is_there(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    values = changed(stage_values("sft", tmp_path / "data"), checkpoint={"every": 1, "background": False})
    for told, there in two_ranks.run(diverging, values, 3):
        assert told.startswith("step 3: the loss is nan; the batch is in ")
        assert there == [1, 2]


def signalled(world: World, values: dict[str, Any], at: int) -> str:
    """SFT in which rank 1 alone gets a SIGTERM during step `at`; what every rank says."""

    class Signalling(Recorder):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            super().log(step, metrics)
            if step == at and world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    try:
        sft(validate("sft", values), Signalling())  # type: ignore[arg-type]
    except Paused as paused:
        return str(paused)
    return "went on"


def test_a_signal_to_one_rank_saves_on_all(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    values = changed(stage_values("sft", tmp_path / "data"), checkpoint={"every": 100})
    whole = changed(values, run={"folder": str(tmp_path / "whole")})
    metrics = two_ranks.run(run_stage, "sft", whole)[0].metrics
    told = "saved after step 3 at SIGTERM: go on with --resume auto"
    assert two_ranks.run(signalled, values, 3) == [told, told]
    resumed = two_ranks.run(run_stage, "sft", changed(values, checkpoint={"resume": "auto"}))[0]
    assert without_clocks(resumed.metrics) == without_clocks(metrics[3:])
    assert weights(tmp_path / "data/run") == weights(tmp_path / "whole")
    assert weights(tmp_path / "data/run/best") == weights(tmp_path / "whole/best") != {}
    best = (tmp_path / "data/run/best/best.json").read_text()
    assert best == (tmp_path / "whole/best/best.json").read_text()


def lines_of_resume(world: World, values: dict[str, Any]) -> tuple[int, list[str]]:
    """The step that SFT goes on from and what it says of the checkpoints; or -1 and why it does not."""
    report = Recorder()
    try:
        sft(validate("sft", values), report)  # type: ignore[arg-type]
    except UserError as error:
        return -1, [str(error)]
    return report.done, [line for line in report.lines if line.startswith("resume ")]


def test_a_damaged_newest_checkpoint_is_told_and_passed_over(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    """Or refused; and when no other is whole, nothing starts from step 0."""
    (tmp_path / "data").mkdir()
    values = changed(stage_values("sft", tmp_path / "data"), train={"epochs": 3})
    run, whole = tmp_path / "data/run", tmp_path / "whole"
    two_ranks.run(run_stage, "sft", values)
    for name in ("model", "best"):
        shutil.copytree(run / name, whole / name)
    *_, before, last = sorted((run / "checkpoints").glob("step-*"))
    damaged = next(last.glob("model/*rank_1*optim_states.pt"))
    flip(damaged, 5000)
    told = f"{damaged}: is damaged: its SHA-256 is not that of what was written"
    refused = changed(values, checkpoint={"resume": "auto", "damaged": "refuse"})
    for done, lines in two_ranks.run(lines_of_resume, refused):
        assert done == -1
        assert lines[0].startswith(told)
    for done, lines in two_ranks.run(lines_of_resume, changed(values, checkpoint={"resume": "auto"})):
        assert done == int(before.name.removeprefix("step-"))
        assert lines == [f"resume       {told}", f"resume       {before}: {done} steps done"]
    assert weights(run) == weights(whole)
    for step in (run / "checkpoints").glob("step-*"):
        (step / "manifest.json").unlink()
    for done, lines in two_ranks.run(lines_of_resume, changed(values, checkpoint={"resume": "auto"})):
        assert done == -1
        assert "there is no whole checkpoint to resume from" in lines[0]
