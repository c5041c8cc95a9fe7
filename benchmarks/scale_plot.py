"""The figure of `scale.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scale_model import Prediction
from benchmarks.scale_published import SETTINGS, Published

COLORS = {"deepspeed-chat": "#2ca02c", "hybridflow": "#1f77b4", "openrlhf": "#d62728"}
LINES = ("-", "--", ":", "-.")
MARKERS = {"DeepSpeed-Chat": "s", "OpenRLHF": "o", "DeepSpeed-Chat, tuned": "^"}
STACK = {
    "prefill": "#9ecae1", "decode": "#3182bd", "shift": "#000000", "scoring": "#fdae6b", "train: policy": "#e6550d",
    "train: critic": "#a63603",
}  # fmt: skip
STACKED = "hybridflow"


def draw(
    found: Mapping[str, Mapping[str, Sequence[Prediction | None]]],
    beside: Sequence[tuple[Published, Prediction | None]],
    counts: Sequence[int],
    path: Path,
) -> None:
    """Lines of seconds against GPUs, published seconds as marks; and the terms, stacked, in one setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(found[STACKED])
    figure, panels = pyplot.subplots(
        1, 1 + len(models), figsize=(8 + 4.6 * len(models), 6.2), width_ratios=[1.5, *([1] * len(models))]
    )
    _lines(panels[0], found, [one for one, _ in beside], counts)
    for axes, model in zip(panels[1:], models, strict=True):
        _stack(axes, model, found[STACKED][model], counts)
    figure.suptitle("Seconds of one PPO iteration on paper: stated rates, nothing measured on a GPU", fontsize=13)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _lines(
    axes: Any,
    found: Mapping[str, Mapping[str, Sequence[Prediction | None]]],
    published: Sequence[Published],
    counts: Sequence[int],
) -> None:
    for name, models in found.items():
        for line, (model, rows) in zip(LINES, models.items(), strict=False):
            points = [(ranks, row.seconds) for ranks, row in zip(counts, rows, strict=True) if row is not None]
            label = f"Gearshift on paper, {model}, {SETTINGS[name].title}'s setting"
            axes.plot(*zip(*points, strict=True), line, color=COLORS[name], label=label, linewidth=1.6)
    for system, marker in MARKERS.items():
        points = [(one.gpus, one.seconds) for one in published if one.system == system]
        color = COLORS[next(one.setting for one in published if one.system == system)]
        face = "none" if system.endswith("tuned") else color
        axes.plot(*zip(*points, strict=True), marker, color=color, markerfacecolor=face, label=f"{system}, published")
        for one in published:
            if one.system == system:
                left = one.gpus in (8, 32)
                name = one.model.replace("llama-2-", "Llama 2 ").replace("opt-", "OPT ")
                axes.annotate(
                    name, (one.gpus, one.seconds), xytext=(-7 if left else 7, -3), textcoords="offset points",
                    ha="right" if left else "left", fontsize=8,
                )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(counts[0] / 2, counts[-1] * 1.3)
    axes.set_ylim(1, 5e4)
    axes.set_xticks(counts, [str(ranks) for ranks in counts])
    axes.set_xlabel("GPUs")
    axes.set_ylabel("seconds")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8, loc="upper right", ncol=1)


def _stack(axes: Any, model: str, rows: Sequence[Prediction | None], counts: Sequence[int]) -> None:
    """Parts of an iteration, as shares, with the seconds above."""
    labels = [str(ranks) for ranks in counts]
    bottom = [0.0] * len(labels)
    for name, color in STACK.items():
        shares = [0.0 if row is None else 100 * seconds_of(row, name) / row.seconds for row in rows]
        axes.bar(labels, shares, bottom=bottom, color=color, label=name, width=0.75)
        bottom = [b + share for b, share in zip(bottom, shares, strict=True)]
    for place, row in enumerate(rows):
        if row is None:
            axes.text(place, 2, "no room", rotation=90, ha="center", va="bottom", fontsize=9)
        else:
            axes.text(place, 101, f"{row.seconds:.3g} s", ha="center", fontsize=9)
    axes.set_ylim(0, 128)
    axes.set_yticks(range(0, 101, 20))
    axes.set_title(f"{model}, {SETTINGS[STACKED].title}'s setting", fontsize=11)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("% of an iteration")
    axes.legend(fontsize=8, ncol=3, loc="upper center")


def seconds_of(row: Prediction, name: str) -> float:
    """Of a part, or of one term of generation or training."""
    if name in ("shift", "scoring"):
        return row.part(name)
    part, _, term = name.partition(": ") if name.startswith("train") else ("generation", "", name)
    return sum(t.seconds for t in row.terms if t.part == part.replace("train", "training") and t.name == term)
