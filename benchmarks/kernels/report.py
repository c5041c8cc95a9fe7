"""What was measured, as tables, as JSON, and as whether each stated figure holds in this run."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.kernels.command import FOLDER, circumstances
from benchmarks.kernels.measuring import Measured, Results
from benchmarks.kernels.picture import draw

SAME = 0.01  # of the size of a result's sum: a variant that is further off computes something else


class Report:
    """Prints as it goes; `finish` prints the stated figures and writes the files."""

    def __init__(self, operation: str, options: argparse.Namespace):
        self.path: Path = options.out or FOLDER / f"{operation}.json"
        self.about = circumstances(operation, options.device, options.repeats)
        self.sections: list[dict[str, Any]] = []
        self.figures: list[dict[str, Any]] = []
        versions = ", ".join(f"{name} {version}" for name, version in self.about["versions"].items() if version)
        print(f"{operation}: {self.about['device']}, {self.about['threads']} threads; {versions}")
        print(
            f"medians of {options.repeats} runs of each, in turn; last column: median of the ratios of pairs\n",
            flush=True,
        )

    def add(self, shape: Mapping[str, Any], of: str, results: Results, base: str, same_as: str) -> None:
        """One table: `of` names the pass, `base` the variant that ratios are to, `same_as` the one results are held
        against."""
        rows = {}
        for name, measured in results.measured.items():
            rows[name] = as_row(measured, results.ratio(name, base))
        differing = different(results, same_as)
        self.sections.append({
            "shape": dict(shape), "pass": of, "base": base, "variants": rows, "left_out": results.left_out,
            "differing": differing,
        })  # fmt: skip
        self._write()  # what was measured stays, should a later shape fail or run out of time
        print_table(describe(shape), of, base, rows)
        for name, reason in results.left_out.items():
            print(f"  left out: {name}: {reason}")
        for name in differing:
            print(f"  DIFFERS: {name}: its results sum to {results.measured[name].total:.6g}, those of {same_as} to "
                  f"{results.measured[same_as].total:.6g}")  # fmt: skip
        print(flush=True)

    def at_most(self, what: str, measured: float | None, bound: float, shape: Mapping[str, Any], unit: str) -> None:
        self._state(f"{what} <= {bound:g}{unit}", measured, unit, shape, measured is not None and measured <= bound)

    def at_least(self, what: str, measured: float | None, bound: float, shape: Mapping[str, Any], unit: str) -> None:
        self._state(f"{what} >= {bound:g}{unit}", measured, unit, shape, measured is not None and measured >= bound)

    def _state(self, figure: str, measured: float | None, unit: str, shape: Mapping[str, Any], holds: bool) -> None:
        self.figures.append({
            "figure": figure, "measured": measured, "unit": unit, "shape": dict(shape),
            "holds": None if measured is None else holds,
        })  # fmt: skip

    def _write(self) -> dict[str, Any]:
        content = self.about | {"sections": self.sections, "figures": self.figures}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return content

    def finish(self, axis: str) -> None:
        """`axis`: the entry of the shape that the picture's x axis is."""
        content = self._write()
        picture = self.path.with_suffix(".png")
        draw(content, axis, picture)
        print(f"written: {self.path}, {picture}")
        for figure in self.figures:
            print(verdict(figure))


def verdict(figure: Mapping[str, Any]) -> str:
    word = {True: "holds", False: "MISSED", None: "not measured"}[figure["holds"]]
    measured = "" if figure["measured"] is None else f": {figure['measured']:.3g}{figure['unit']}"
    return f"{word:<13}{figure['figure']}{measured}  ({describe(figure['shape'])})"


def describe(shape: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in shape.items())


def as_row(measured: Measured, ratio: float | None) -> dict[str, Any]:
    return {
        "median_seconds": measured.median,
        "min_seconds": min(measured.seconds),
        "max_seconds": max(measured.seconds),
        "median_wall_seconds": statistics.median(measured.wall),
        "ratio": ratio,
        "peak_bytes": measured.peak,
        "seconds": measured.seconds,
        "wall_seconds": measured.wall,
    }


def different(results: Results, same_as: str) -> list[str]:
    """Variants whose results sum to something else."""
    if same_as not in results.measured:
        return []
    want = results.measured[same_as].total
    assert want is not None, f"{same_as} is not comparable"
    return [
        name
        for name, measured in results.measured.items()
        # A NaN compares false with everything, and is a difference.
        if measured.total is not None and not abs(measured.total - want) <= SAME * max(1.0, abs(want))
    ]


def print_table(title: str, of: str, base: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    width = max([len(name) for name in rows] + [12])
    keys = ["median_seconds", "min_seconds", "max_seconds"]
    on_gpu = any(row["seconds"] != row["wall_seconds"] for row in rows.values())
    keys += ["median_wall_seconds"] if on_gpu else []
    heads = ["ms", "min", "max", *(["wall ms"] if on_gpu else []), "peak MiB"]
    print(f"{of}, {title}")
    print(f"  {'':<{width}} {' '.join(f'{name:>10}' for name in heads)}   / {base}")
    for name, row in rows.items():
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.1f}"
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3g}"
        print(f"  {name:<{width}} {' '.join(f'{row[k] * 1000:10,.3f}' for k in keys)} {peak:>10}   {ratio}")
