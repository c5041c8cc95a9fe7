"""What rank 0 shows: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import io

from gearshift.launch.progress import Progress, clock_time, shown


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_in_a_file() -> None:
    clock, file = Clock(), io.StringIO()
    with Progress(100, "ppo", "iteration", file=file, every=10, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 1.5
            metrics = {"objective/scores": step / 10, "objective/kl": 0.25, "throughput/tokens_per_second": 1234.4}
            progress.update({**metrics, "loss/pretraining_heldout": 3.0} if step == 1 else metrics)
    lines = file.getvalue().splitlines()
    assert lines[0] == "ppo: iteration 1/100, reward 0.100, kl 0.250, text loss 3.000, tok/s 1234, 2:28 left"
    # Every 7 steps of 1.5 s; the held-out loss stays as it was last measured.
    assert lines[1] == "ppo: iteration 8/100, reward 0.800, kl 0.250, text loss 3.000, tok/s 1234, 2:18 left"
    assert lines[-1] == "ppo: iteration 100/100, reward 10.000, kl 0.250, text loss 3.000, tok/s 1234, 0:00 left"
    assert len(lines) == 1 + 14 + 1


def test_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    file = Terminal()
    with Progress(2, "sft", file=file) as progress:
        progress.update({"loss/train": 2.5})
        progress.say("a line above")
        progress.update({"loss/train": 1.25})
    text = file.getvalue()
    assert "a line above\n" in text
    assert "2/2" in text
    assert "loss=1.2500" in text


def test_shown_and_clock_time() -> None:
    assert shown({"loss/train": 1.0, "policy/clipfrac_avg": 0.1}) == {"loss": "1.0000"}
    assert [clock_time(s) for s in (0, 59.6, 3599, 3723)] == ["0:00", "1:00", "59:59", "1:02:03"]
