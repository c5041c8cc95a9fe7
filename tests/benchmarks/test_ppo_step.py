"""`benchmarks/ppo_step.py` without its peers: its arithmetic, its processes, and an iteration of Gearshift's way."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ppo_step
from benchmarks.peers import table, trl_environment
from benchmarks.peers.gearshift_worker import Iterations
from benchmarks.peers.processes import Turn, Way, WorkerError
from benchmarks.peers.setting import Setting, make, prompts_of
from benchmarks.peers.worker import PHASES, Clock
from tests.worker_group import WorkerGroup

TINY = Setting(vocabulary=64, hidden=16, layers=1, heads=2, episodes=4, prompt_tokens=5, new_tokens=6, micro_batch=2)


def turn(generation: float, score: float, train: float, peak: int, cpu: float) -> Turn:
    return Turn({"generation": generation, "score": score, "train": train}, peak, cpu)


OURS = [turn(1, 1, 2, 100, 5), turn(2, 1, 5, 120, 6), turn(1, 2, 2, 110, 7)]  # 4, 8 and 5 s
THEIRS = [turn(5, 1, 2, 300, 10), turn(6, 2, 16, 200, 9), turn(1, 1, 3, 200, 7)]  # 8, 24 and 5 s


def test_a_row_has_the_medians_and_the_highest_peak() -> None:
    row = table.row(OURS, episodes=10, new_tokens=8)
    assert (row["seconds"], row["phases"], row["peak_bytes"]) == (5, {"generation": 1, "score": 1, "train": 2}, 120)
    assert row["cpu_seconds"] == 6
    assert (row["episodes_per_second"], row["generated_tokens_per_second"]) == (2, 80)


def test_ratios_are_taken_within_a_turn_and_beside_as_many_processes() -> None:
    found = table.ratios({"gearshift": OURS, "trl": THEIRS, "plain-zero3": THEIRS})
    assert list(found) == ["trl"]  # there is nothing with two processes to hold the other against
    assert found["trl"] == {
        "seconds": 2,
        "generation": 3,
        "score": 1,
        "train": 1.5,
        "cpu_seconds": 1.5,
        "peak_bytes": 2.5,
    }


@pytest.mark.parametrize(("vocabulary", "words"), [(8192, ["holds", "holds"]), (50_257, ["holds", "MISSED"])])
def test_memory_is_held_against_less_at_a_large_vocabulary(vocabulary: int, words: list[str]) -> None:
    ratio = {"seconds": 1.6, "generation": 1.0, "score": 1.0, "train": 1.0, "peak_bytes": 1.5}
    assert [line.split()[0] for line in table.verdicts({"trl": ratio}, vocabulary)] == words


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    rows = {"gearshift": table.row(OURS, 10, 8), "trl": table.row(THEIRS, 10, 8)}
    table.draw({"ways": rows, "title": "two ways"}, tmp_path / "ways.png")
    assert (tmp_path / "ways.png").stat().st_size > 5_000
    assert len({len(line) for line in table.lines(rows)}) == 1


WORKER = """
from benchmarks.peers.worker import Channel, turns
channel = Channel()
print("not an answer")
for number, clock in enumerate(turns(channel)):
    for phase in ("generation", "score", "train"):
        clock.ends(phase)
    if number == 1:
        raise SystemExit("no more memory")
"""


@pytest.fixture
def way(tmp_path: Path) -> Iterator[Way]:
    found = Way("ours", [sys.executable, "-c", WORKER], 2, tmp_path)
    yield found
    found.stop()


def test_processes_take_turns_and_one_that_fails_is_told(way: Way) -> None:
    assert [answer["peak_reset"] for answer in way.loaded()] in ([True, True], [False, False])
    taken = way.turn()
    assert 0 <= taken.cpu_seconds < 1
    assert tuple(taken.seconds) == PHASES
    assert taken.peak_bytes > 1 << 20
    with pytest.raises(WorkerError, match=r"ours: a process ended(.|\n)*no more memory"):
        way.turn()


def test_what_other_processes_take_is_noticed() -> None:
    elsewhere, until = ppo_step.Elsewhere([]), time.process_time() + 0.2
    while time.process_time() < until:
        pass
    assert 0 < elsewhere.share() < 1.05


def test_without_its_environment_a_way_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise trl_environment.EnvironmentMissing("pip install: no network")

    monkeypatch.setattr(trl_environment, "python", missing)
    left_out: dict[str, str] = {}
    assert ppo_step.start(argparse.Namespace(ways=["trl"]), tmp_path, {}, left_out) == {}
    assert left_out == {"trl": "pip install: no network"}


def test_trl_runs_with_the_pinned_versions_of_what_both_use() -> None:
    assert [line.partition("==")[0] for line in trl_environment._pinned()] == list(trl_environment.SHARED)


def test_episodes_that_no_way_could_share_out_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ppo_step.py", "--episodes", "15"])
    with pytest.raises(SystemExit):
        ppo_step.arguments()
    assert "--episodes 15: 2 processes cannot share them in whole micro-batches" in capsys.readouterr().err


def _two_iterations(world: Any, folder: Path) -> list[tuple[dict[str, float], float, dict[str, float]]]:
    iterations, found = Iterations(folder, world), []
    for _ in range(2):
        clock = Clock()
        metrics = iterations.next(clock)
        found.append((clock.seconds, clock.total(), metrics))
    return found


def test_an_iteration_of_gearshift(tmp_path: Path) -> None:
    make(TINY, tmp_path)
    assert [len(prompt) for prompt in prompts_of(tmp_path)] == [5] * 4
    group = WorkerGroup(1)
    try:
        (found,) = group.run(_two_iterations, tmp_path)
    finally:
        group.stop()
    for seconds, total, metrics in found:
        assert tuple(seconds) == PHASES
        assert 0.9 * total < sum(seconds.values()) <= total
        assert (metrics["rollout/length"], metrics["policy/updates"]) == (6, 1)  # no answer ends early; one step
    assert found[0][2]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert found[1][2]["objective/kl"] != pytest.approx(0, abs=1e-7)  # the weights have moved
