"""How time and memory of a PPO iteration grow with model size, sequence length, batch and ranks.

    python benchmarks/growth.py --out benchmarks/results/growth-cpu.json     (and a PNG beside it)
    python benchmarks/growth.py --panels length --out ...                    (the file's other panels stay)

Every point is a `gearshift bench` of its own: random Llamas, random prompts, the first iteration not counted. Time is
the seconds of all processors together (on GPUs the seconds that pass), so that neither what else the machine does nor
ranks that share a core are in it. Memory is the largest rank's peak above that of a run of next to nothing
(`base_of`) on as many ranks: without Python, libraries and fixed buffers. Exponents are slopes on log-log paper, of
all points and of the last two, where what does not grow weighs least. Beside them stands what the algorithm requires;
what is above it by more than `TOLERANCE` is told.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The repository in place of this folder, whose `kernels` would hide Hugging Face's package of that name.
ROOT = Path(__file__).resolve().parents[1]
if sys.path[0] == str(ROOT / "benchmarks"):
    sys.path[0] = str(ROOT)

TOLERANCE = 0.15


@dataclass(frozen=True)
class Run:
    """What one point measures: a Llama with heads of 64, and an iteration of `batch` episodes."""

    hidden: int = 256
    layers: int = 4
    prompt: int = 32
    response: int = 32
    batch: int = 8
    ranks: int = 1
    micro_batch: int = 4
    slots: int = 8  # rows decoded at once: else the cache of keys and values grows with the batch

    def words(self) -> list[str]:
        """What follows `gearshift bench`."""
        heads = max(1, self.hidden // 64)
        settings = {
            "policy.config.hidden_size": self.hidden,
            "policy.config.intermediate_size": 8 * self.hidden // 3 // self.ranks * self.ranks,  # ranks cut it up
            "policy.config.num_hidden_layers": self.layers,
            "policy.config.num_attention_heads": heads,
            "policy.config.num_key_value_heads": heads,
            "policy.config.vocab_size": 1024,
            "data.max_prompt_tokens": self.prompt,
            "rollout.max_new_tokens": self.response,
            "rollout.slots": self.slots,
            "rollout.tp_size": self.ranks,
            "ppo.batch_size": self.batch,
            "ppo.minibatches": 1,
            "ppo.micro_batch_size": self.micro_batch,
            "run.ranks": self.ranks,
        }
        return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@dataclass(frozen=True)
class Panel:
    """Runs along one axis, and the largest exponents that the algorithm requires of time and memory."""

    axis: str
    runs: Sequence[Run]
    time: float
    memory: float
    why: str

    def at(self, run: Run, found: Mapping[str, Any]) -> float:
        """The run's place on the axis."""
        places = {
            "parameters": found["parameters"],
            "tokens of prompt and response": run.prompt + run.response,
            "episodes": run.batch,
            "ranks": run.ranks,
        }
        return float(places[self.axis])


PANELS = {
    "size": Panel(
        "parameters",
        [Run(hidden=hidden, layers=layers) for hidden, layers in ((128, 2), (256, 4), (384, 6), (512, 8))],
        time=1, memory=1,
        why="products, weights, gradients and optimizer state are linear in parameters, activations less",
    ),
    "length": Panel(
        "tokens of prompt and response",
        [Run(prompt=half, response=half) for half in (16, 32, 64, 128, 256)],
        time=2, memory=1,
        why="products are linear in tokens, attention quadratic; activations and the cache of keys and values linear",
    ),
    "batch": Panel(
        "episodes",
        [Run(batch=batch) for batch in (8, 16, 32, 64)],
        time=1, memory=0,
        why="linear in episodes; at one micro-batch and as many slots no memory but the episodes', some bytes a token",
    ),
    "ranks": Panel(
        "ranks",
        [Run(hidden=512, layers=4, batch=16, ranks=ranks) for ranks in (1, 2, 4)],
        time=1, memory=0,
        why="the same products in all; what every rank receives of weights and gradients is, of all together, linear; "
        "weights and optimizer state of a rank fall with their number, activations stay",
    ),
}  # fmt: skip


def base_of(ranks: int) -> Run:
    """Next to nothing: a head for each rank, one layer, 16 tokens."""
    return Run(hidden=64 * ranks, layers=1, prompt=8, response=8, batch=4, ranks=ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--panels", nargs="*", choices=PANELS, default=list(PANELS))
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file, and a PNG beside it")
    options = parser.parse_args()
    bases: dict[int, dict[str, Any]] = {}
    found: dict[str, Any] = {}
    if options.out and options.out.exists():
        found = json.loads(options.out.read_text(encoding="utf-8"))
    for name in options.panels:
        found[name] = measure(PANELS[name], options.iterations, bases)
        found = {panel: found[panel] for panel in PANELS if panel in found}
        print("\n".join(as_text(name, found[name])), flush=True)
        if options.out:  # after each, since they take minutes
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            draw(found, options.out.with_suffix(".png"))


def measure(panel: Panel, iterations: int, bases: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The panel's points, its exponents and what the algorithm requires. `bases`: those of `base_of`, by ranks."""
    points = []
    for run in panel.runs:
        if run.ranks not in bases:
            bases[run.ranks] = bench(base_of(run.ranks), iterations)
        one = bench(run, iterations)
        points.append({"at": panel.at(run, one), **point(one, bases[run.ranks])})
        print(f"  {panel.axis} {points[-1]['at']:,.0f}: {points[-1]['time']:.3g} s", file=sys.stderr, flush=True)
    return {
        "axis": panel.axis,
        "why": panel.why,
        "required": {"time": panel.time, "memory": panel.memory},
        "points": points,
        "exponents": {name: exponents(points, name) for name in points[0] if name != "at"},
    }


def bench(run: Run, iterations: int) -> dict[str, Any]:
    """The figures of `gearshift bench`, with one thread a rank."""
    with tempfile.TemporaryDirectory(prefix="gearshift-growth-") as folder:
        out = Path(folder) / "found.json"
        words = [*run.words(), "--iterations", str(iterations), "--out", str(out)]
        done = subprocess.run(
            [sys.executable, "-m", "gearshift.launch", "bench", *words],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{run}: {done.stderr}")
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def point(found: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of an iteration and of each of its phases, bytes above the base's, bytes that a rank receives."""
    summary = found["summary"]
    on_cpu = found["device"] == "cpu"
    whole = summary["processor_seconds" if on_cpu else "step_seconds"]["median"]
    phases = {name: summary[f"{name}_seconds"]["min"] for name in ("generation", "score", "policy", "critic", "shift")}
    return {
        "time": whole,
        "memory": max(1, max(found["memory_peak"]) - max(base["memory_peak"])),  # 0 has no logarithm
        "seconds": summary["step_seconds"]["median"],
        **phases,
        "received": summary["shift_bytes_inside_host_per_rank"]["median"],
    }


def exponents(points: Sequence[Mapping[str, float]], name: str) -> dict[str, float | None]:
    """Slopes of log(figure) over log(place): of the `fit` through all points, and of the `last` two."""
    logs = [(math.log(p["at"]), math.log(p[name])) for p in points if p[name] > 0]
    if len(logs) < len(points):
        return {"fit": None, "last": None}
    (x0, y0), (x1, y1) = logs[-2:]
    fit = statistics.linear_regression([x for x, _ in logs], [y for _, y in logs])
    return {"fit": fit.slope, "last": (y1 - y0) / (x1 - x0)}


def too_fast(panel: Mapping[str, Any]) -> list[str]:
    """Of time and memory, what grows faster than the algorithm requires, by the last two points."""
    last = {name: panel["exponents"][name]["last"] for name in panel["required"]}
    return [
        name for name, most in panel["required"].items() if last[name] is not None and last[name] > most + TOLERANCE
    ]


def as_text(name: str, panel: Mapping[str, Any]) -> list[str]:
    """The panel as a table: points in rows, exponents below."""
    columns = [key for key in panel["points"][0] if key != "at"]
    lines = [f"\n{name}: {panel['why']}", f"{panel['axis'][:14]:>14}" + "".join(f"{c:>12}" for c in columns)]
    for one in panel["points"]:
        lines.append(f"{one['at']:>14,.0f}" + "".join(f"{_shown(c, one[c]):>12}" for c in columns))
    for which in ("fit", "last"):
        slopes = [panel["exponents"][c][which] for c in columns]
        lines.append(f"{'exponent, ' + which:>14}" + "".join(f"{'-' if s is None else f'{s:.2f}':>12}" for s in slopes))
    required = panel["required"]
    lines.append(f"{'required':>14}" + "".join(f"{f'<= {required[c]}' if c in required else '':>12}" for c in columns))
    return [*lines, *(f"MORE than the algorithm requires: {what}" for what in too_fast(panel))]


def _shown(column: str, value: float) -> str:
    return f"{value / 1e6:,.1f} MB" if column in ("memory", "received") else f"{value:.3g} s"


def draw(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """One plot for each axis: time on the left, memory on the right, a factor of ten as high as it is wide on both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, plots = pyplot.subplots(1, len(found), figsize=(5.2 * len(found), 4.8), squeeze=False)
    for axes, panel in zip(plots[0], found.values(), strict=True):
        places = [one["at"] for one in panel["points"]]
        every = [places, *([one[name] for one in panel["points"]] for name in ("time", "memory"))]
        factor = 1.5 * max(max(values) / min(values) for values in every)
        for side, name, color, scale, unit in (
            (axes, "time", "#1f77b4", 1.0, "processor seconds of an iteration"),
            (axes.twinx(), "memory", "#d62728", 1e-6, "MB of a rank, above the base"),
        ):
            values = [one[name] * scale for one in panel["points"]]
            slope = panel["exponents"][name]
            told = f"{name}: exponent {slope['fit']:.2f}, last {slope['last']:.2f}, required {panel['required'][name]}"
            side.plot(places, values, "o-", color=color, label=told)
            for limits, shown in ((side.set_xlim, places), (side.set_ylim, values)):
                middle = math.sqrt(min(shown) * max(shown))
                limits(middle / math.sqrt(factor), middle * math.sqrt(factor))
            side.set_xscale("log")
            side.set_yscale("log")
            side.set_ylabel(unit, color=color)
            side.legend(loc="upper left" if name == "time" else "lower right", fontsize=8)
        axes.set_xticks(places, [f"{at / 1e6:.2g} M" if at >= 1e5 else f"{at:.0f}" for at in places])
        axes.minorticks_off()
        axes.set_xlabel(panel["axis"])
        axes.grid(True, alpha=0.3)
    figure.suptitle("A PPO iteration against what grows, on log-log paper: one thread a rank")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
