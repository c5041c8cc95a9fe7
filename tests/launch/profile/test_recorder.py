"""A recorder in this process: which steps it takes, and what it and its page say of them."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from gearshift.engine import World, spans
from gearshift.engine.work import Work
from gearshift.errors import UserError
from gearshift.kernels import native
from gearshift.launch.profile import PAGE, missing, peaks, write
from gearshift.launch.profile.page import bound
from gearshift.launch.profile.peaks import Peaks
from gearshift.launch.profile.recorder import Recorder
from gearshift.rlhf.settings import ProfileSettings
from tests.rlhf.tiny import Recorder as Report

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_SIZE", {"cpu": (256, 1 << 20)})


class Stage:
    """Steps of a product and a wait in one phase, with another inside it."""

    def __init__(self, **settings: int):
        self.finished = 0
        self.recorder = Recorder(ProfileSettings(**settings), "step", ALONE, torch.float32, self._finish)
        self._x = torch.randn(64, 64)

    def run(self, steps: int) -> Recorder:
        with spans.listening(self.recorder):
            for number in range(1, steps + 1):
                with spans.step(number):
                    self.forward()
                with spans.span("saving"):  # between steps
                    spans.count(lambda: Work(1e9))
        return self.recorder

    @spans.span("forward")
    def forward(self) -> None:
        spans.count(lambda: Work(2e6, 0))
        self._x @ self._x
        native.run("few_rows_linear", lambda: 0)
        with spans.span("wait"):
            spans.count(lambda: Work(0, 3e3))
            time.sleep(0.02)

    def _finish(self, recorder: Recorder) -> None:
        self.finished += 1


def test_the_second_step_is_recorded(tmp_path: Path) -> None:
    stage = Stage(iterations=1)
    recorder = stage.run(3)
    assert (recorder.steps, recorder.came, stage.finished, missing(recorder)) == ([2], 3, 1, "")
    assert recorder.work == {
        "step": [Work(2e6), Work(0, 3e3)],
        "forward": [Work(2e6), Work(0, 3e3)],
        "forward/wait": [Work(0, 3e3)],
    }
    report = Report()
    write("sft", tmp_path, recorder, report)
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert page.startswith("# Profile of gearshift sft, step 2\n\nRank 0 of 1 rank on the CPU; ")
    rows = {row[0]: row[1:] for row in (line[2:-2].split(" | ") for line in page.splitlines() if line[:2] == "| ")}
    assert re.search(r"`aten::mm` [\d.]+ s [\d.]+% x 1\b", rows["forward"][0])
    assert "`gearshift::few_rows_linear`" in rows["forward"][0]
    assert rows["&emsp;wait"] == ["-"]  # nothing but Python
    assert re.search(r"^\| &emsp;wait \| 0\.0\d\d \| \d+\.\d% \| 0\.0% \| 0\.0% \| 100\.0% \|$", page, re.MULTILINE)
    assert re.search(r"^\| &emsp;wait \| - \| 3e-06 \| .* \| memory bandwidth \| ", page, re.MULTILINE)
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank0.json.gz"]
    assert report.lines == [
        f"profile      {tmp_path / PAGE} says where the time goes; {tmp_path / 'profile'}/ holds a trace of each rank"
    ]


def test_several_steps_are_told_together(tmp_path: Path) -> None:
    recorder = Stage(iterations=2, after=0).run(4)
    assert (recorder.steps, recorder.before, len(recorder.work["forward"])) == ([1, 2], 0.0, 4)
    write("sft", tmp_path, recorder, Report())
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "steps 1, 2\n" in page
    assert re.search(r"^Each took [\d.]+ s under the profiler\.$", page, re.MULTILINE)


def test_a_run_with_too_few_steps_is_told() -> None:
    recorder = Stage(iterations=1).run(1)
    assert not recorder.steps
    assert missing(recorder) == (
        "run.profile: nothing was profiled: this start had 1 step, and run.profile.after lets 1 go by first, to warm up"
    )
    recorder = Stage(iterations=3).run(3)
    assert missing(recorder).startswith("run.profile: 2 of 3 steps were profiled: this start had 3 steps, and ")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("")
    recorder = Stage(iterations=1).run(2)
    with pytest.raises(UserError, match=r"run\.profile: .*/profile/rank0\.json\.gz cannot be written: "):
        write("sft", tmp_path, recorder, Report())


def test_without_a_listener_nothing_is_worked_out() -> None:
    def wrong() -> Work:
        raise AssertionError

    with spans.step(1), spans.span("train"):
        spans.count(wrong)


def test_the_longer_of_the_two_bounds_a_phase() -> None:
    rates = Peaks(10.0, 10.0, "", 1)
    assert bound([Work(30, 20), Work(0, 20)], rates) == "flops"
    assert bound([Work(30, 20), Work(0, 40)], rates) == "memory bandwidth"


def test_peaks_are_of_this_rank() -> None:
    found = peaks.measure(ALONE, torch.float32)
    assert found.product == "256 x 256 fp32"
    assert found.threads == torch.get_num_threads()
    assert min(found.flops, found.bytes) > 1e6
