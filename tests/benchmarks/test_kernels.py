"""The benchmarks of the kernels run, on toy sizes, and tell what they found."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import OPERATIONS
from benchmarks.kernels.measuring import Measured, Results

SIZES = "--device cpu --tokens 8 --hidden 8 --vocabularies 24 --sequences 4 --lengths 12 --rows 3 --repeats 2"
PICTURED = "ppo_targets"  # one is enough: they take a second each


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_benchmark_writes_tables_and_figures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"{name}.json"
    if name != PICTURED:
        monkeypatch.setattr("benchmarks.kernels.report.draw", lambda *_: None)
    monkeypatch.setattr(sys, "argv", [name, *SIZES.split(), "--compile-limit", "0", "--out", str(out)])
    importlib.import_module(f"benchmarks.kernels.{name}").main()
    printed = capsys.readouterr().out
    assert "DIFFERS" not in printed
    assert "left out" not in printed
    content = json.loads(out.read_text())
    assert str(tmp_path) not in content["command"]
    assert out.with_suffix(".png").exists() == (name == PICTURED)
    for section in content["sections"]:
        for row in section["variants"].values():
            assert len(row["seconds"]) == 2
            assert row["peak_bytes"] is None or row["peak_bytes"] >= 0
    for figure in content["figures"]:
        assert figure["figure"] in printed
        assert figure["measured"] is not None or figure["figure"].startswith("peak memory")  # of such sizes: 0


def test_a_ratio_is_the_median_of_pairs_and_not_of_times() -> None:
    results = Results({"a": Measured([2.0, 30.0, 4.0]), "b": Measured([1.0, 10.0, 4.0])}, {})
    assert results.ratio("a", "b") == 2.0
    assert results.ratio("a", "left out") is None
