"""Exponents and verdicts of `benchmarks/growth.py` by hand, and every run that it would start is one that can start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.growth import PANELS, Run, as_text, base_of, draw, exponents, point, too_fast
from gearshift.launch.bench import RANDOM
from gearshift.launch.config import load
from gearshift.launch.overrides import parse_arguments

RUNS = [base_of(1), base_of(4), *(run for panel in PANELS.values() for run in panel.runs)]


@pytest.fixture(autouse=True)
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the check of a config builds its model without weights, for which it imports torch."""
    monkeypatch.setattr("gearshift.rlhf.new_model.try_new_model", lambda fields: None)


def test_every_run_can_start() -> None:
    for run in RUNS:
        config: Any = load("bench", RANDOM, parse_arguments(run.words()).overrides, ranks=run.ranks)
        assert config.policy.config["intermediate_size"] % config.rollout.tp_size == 0


def test_a_run_that_cannot_start_would_be_seen() -> None:
    overrides = parse_arguments(Run(hidden=64, ranks=2).words()).overrides
    with pytest.raises(Exception, match=r"rollout.tp_size: 2 does not divide the 1 attention heads"):
        load("bench", RANDOM, overrides, ranks=2)


def test_exponents_are_slopes_on_log_log_paper() -> None:
    points = [{"at": x, "square": x**2, "mixed": x + 3 * x**2, "none": 0.0} for x in (1.0, 2.0, 4.0, 8.0)]
    assert exponents(points, "square") == {"fit": pytest.approx(2.0), "last": pytest.approx(2.0)}
    mixed = exponents(points, "mixed")
    assert mixed["last"] == pytest.approx(1.9434, abs=1e-4)  # log2(200 / 52)
    assert mixed["fit"] == pytest.approx(1.8824, abs=1e-3)
    assert exponents(points, "none") == {"fit": None, "last": None}


def found(seconds: float, peak: int, device: str = "cpu") -> dict[str, Any]:
    names = [f"{name}_seconds" for name in ("generation", "score", "policy", "critic", "shift", "step", "processor")]
    spreads = {name: {"median": seconds, "min": seconds / 2, "max": 2 * seconds} for name in names}
    spreads["processor_seconds"]["median"] = 2 * seconds
    return {
        "device": device,
        "memory_peak": [peak, peak - 5],
        "summary": spreads | {"shift_bytes_inside_host_per_rank": {"median": 7.0}},
    }


def test_time_is_of_processors_and_memory_above_the_base() -> None:
    one = point(found(3.0, 1000), found(1.0, 400))
    assert (one["time"], one["seconds"], one["score"], one["memory"], one["received"]) == (6.0, 3.0, 1.5, 600, 7.0)
    assert point(found(3.0, 1000, "an accelerator"), found(1.0, 400))["time"] == 3.0


def test_what_grows_too_fast_is_told(tmp_path: Path) -> None:
    points = [{"at": x, "time": x**1.4, "memory": 5e6 * x**0.9} for x in (10.0, 20.0, 40.0)]
    slopes = {name: exponents(points, name) for name in ("time", "memory")}
    panel = {
        "axis": "episodes",
        "why": "of these numbers",
        "required": {"time": 1, "memory": 1},
        "points": points,
        "exponents": slopes,
    }
    assert too_fast(panel) == ["time"]
    assert as_text("batch", panel)[-1] == "MORE than the algorithm requires: time"
    draw({"batch": panel}, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 0
