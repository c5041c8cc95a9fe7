"""The best model of a run, kept apart, and its state in the checkpoints. Who chooses it: test_sft.py."""

from __future__ import annotations

from pathlib import Path

import torch

from gearshift.engine import World
from gearshift.rlhf.best import Best
from tests.rlhf.tiny import Recorder


def test_what_is_kept_must_be_what_the_checkpoint_says(tmp_path: Path) -> None:
    """Else the best model is looked for anew: after a kill behind a later best one, in another folder, a torn file."""
    world, report, saved = World(0, 1, 0, 1, torch.device("cpu")), Recorder(), list[str]()

    def save(folder: str) -> None:
        Path(folder).mkdir(exist_ok=True)
        saved.append(folder)

    def best(resumes: bool) -> Best:
        return Best(str(tmp_path), world, report, save, resumes=resumes)

    run = best(False)
    assert [run.offer(step, score) for step, score in enumerate([-3.0, -2.0, -2.0, float("nan")], 1)] == [
        True, True, False, False,
    ]  # fmt: skip
    state = run.state()
    assert (state, len(saved)) == ({"step": 2, "score": -2.0}, 2)
    resumed = best(True)
    resumed.set_state(state)
    assert (resumed.step, resumed.offer(3, -2.5)) == (2, False)
    run.offer(5, -1.0)  # later than the checkpoint that is resumed from
    resumed = best(True)
    resumed.set_state(state)
    assert resumed.step is None
    assert resumed.offer(3, -2.5)
    (tmp_path / "best/best.json").write_text('{"step": 3, "sc')
    resumed.set_state(state)
    assert [line for line in report.lines if "looked for anew" in line] == report.lines
    assert len(report.lines) == 2
    best(False)
    assert not (tmp_path / "best").exists()
