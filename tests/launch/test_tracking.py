"""What a run folder holds after a few steps, and that writing it leaves the process as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gearshift.errors import UserError
from gearshift.launch.config import load
from gearshift.launch.tracking import Tracker

from .conftest import example, write


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import PartialState
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # As under the launcher, where accelerate would build process groups of its own and change the thread count.
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    threads, before = torch.get_num_threads(), dict(PartialState._shared_state)
    config = load("ppo", write(example("ppo")))
    folder = here / "runs" / "ppo"
    tracker = Tracker(folder, ["tensorboard"], config)
    tracker.log(1, {"objective/kl": 0.5, "val/ratio": float("nan")})
    # Written at once: a run that dies can be read.
    assert read(folder / "metrics.jsonl") == [{"step": 1, "objective/kl": 0.5, "val/ratio": None}]
    tracker.log(2, {"objective/kl": 0.75})
    row = {"prompt": "2 + 2 =", "response": " vier\u00e9", "score": 1.0, "kl": 0.1, "finished": True}
    tracker.samples(2, [row, row])
    assert read(folder / "samples.jsonl") == [{"step": 2, **row}] * 2
    tracker.close()

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("objective/kl")] == [(1, 0.5), (2, 0.75)]
    assert load("ppo", folder / "config.yaml") == config
    assert torch.get_num_threads() == threads
    assert PartialState._shared_state == before
    assert not torch.distributed.is_initialized()


def test_a_second_run_replaces_the_first(here: Path) -> None:
    """Curves and report of the two are not mixed; the first one's model stays until the second has one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = load("ppo", write(example("ppo")))
    folder = Path("runs/ppo")
    for step in (1, 2):
        with Tracker(folder, ["tensorboard"], config) as tracker:
            tracker.log(step, {"loss/train": 1.0})
            tracker.samples(step, [{"prompt": "a"}])
            left = [name for name in ("report.html", "report", "model") if (folder / name).exists()]
        assert left == ([] if step == 1 else ["model"])
        (folder / "report.html").touch()
        for name in ("report", "model"):
            (folder / name).mkdir(exist_ok=True)
    assert [row["step"] for row in read(folder / "metrics.jsonl")] == [2]
    assert [row["step"] for row in read(folder / "samples.jsonl")] == [2]
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss/train")] == [2]


def test_what_no_run_wrote_is_left_alone(here: Path) -> None:
    Path("mine/report").mkdir(parents=True)
    with Tracker("mine", [], load("ppo", write(example("ppo")))):
        assert Path("mine/report").is_dir()


def test_a_folder_that_cannot_be_written(here: Path) -> None:
    Path("file").touch()
    with pytest.raises(UserError, match=r"run\.folder: file/run cannot be written"):
        Tracker("file/run", [], load("ppo", write(example("ppo"))))
