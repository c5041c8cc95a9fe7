"""Time and peak memory of each variant, against the vocabulary's size or the sequences' length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

OURS = ("#d62728", "#ff9896", "#8c1a1b", "#e7969c")
PEERS = ("#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#bcbd22", "#e377c2")
FLOOR = "#555555"
PRODUCTS = "plain products"
LABELS = {"V": "vocabulary", "L": "length, tokens"}
SPREAD = 20  # largest over smallest value of a panel from which its axis is logarithmic


def draw(content: Mapping[str, Any], axis: str, path: Path) -> None:
    """`content` is what the JSON file holds; `axis`, a name of its shapes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    passes = list(dict.fromkeys(section["pass"] for section in content["sections"]))
    names = list(dict.fromkeys(name for section in content["sections"] for name in section["variants"]))
    styles = dict(zip(names, style(names), strict=True))
    figure, panels = pyplot.subplots(2, len(passes), figsize=(6.4 * len(passes), 8.4), squeeze=False)
    for column, of in enumerate(passes):
        sections = [section for section in content["sections"] if section["pass"] == of]
        for row, (key, unit, title) in enumerate([
            ("median_seconds", 1e3, f"{of}: time, ms"), ("peak_bytes", 2**-20, f"{of}: peak memory, MiB")
        ]):  # fmt: skip
            panel(panels[row][column], sections, axis, key, unit, styles)
            panels[row][column].set_title(title, fontsize=11)
    fixed = " ".join(f"{k}={v}" for k, v in content["sections"][0]["shape"].items() if k != axis)
    figure.suptitle(f"{content['operation']}, {fixed}\n{content['device']}, {content['date']}", fontsize=12)
    labels = dict(zip(map(label, names), styles.values(), strict=True))  # the floors of both passes are one entry
    handles = [pyplot.Line2D([], [], **look) for look in labels.values()]
    columns = 2 if len(passes) == 1 else 3
    lines = -(-len(labels) // columns)
    figure.legend(handles, list(labels), loc="lower center", ncols=columns, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.02 + 0.025 * lines, 1, 0.99))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def label(name: str) -> str:
    return PRODUCTS if name.endswith(("product", "products")) else name


def style(names: list[str]) -> list[dict[str, Any]]:
    """Gearshift in reds, the floor dashed, peers in other colours."""
    ours, peers = iter(OURS * 3), iter(PEERS * 3)
    found = []
    for name in names:
        if name.startswith("gearshift"):
            found.append({"color": next(ours), "marker": "o", "linewidth": 2.4})
        elif label(name) == PRODUCTS:
            found.append({"color": FLOOR, "marker": "", "linewidth": 1.8, "linestyle": "--"})
        else:
            found.append({"color": next(peers), "marker": "s", "markersize": 4, "linewidth": 1.4})
    return found


def panel(
    axes: Any, sections: list[dict[str, Any]], axis: str, key: str, unit: float, styles: dict[str, dict[str, Any]]
) -> None:
    drawn = []
    for name, look in styles.items():
        points = [(s["shape"][axis], s["variants"][name][key]) for s in sections if name in s["variants"]]
        points = [(x, y * unit) for x, y in points if y is not None]
        if points:
            axes.plot(*zip(*points, strict=True), **look)
            drawn += [y for _, y in points]
    ticks = sorted({section["shape"][axis] for section in sections})
    if len(ticks) > 1 and ticks[-1] / ticks[0] >= 8:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(LABELS.get(axis, axis))
    positive = [y for y in drawn if y > 0]
    if positive and max(positive) / min(positive) > SPREAD:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.3)
