"""How figures look: colours that stay with a system through the whole report, and the few drawing habits they share.

The palette is Okabe and Ito's, which stays apart under the common colour-vision deficiencies; PPO-ptx also carries
markers, so a print without colour can be read.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib import colors, font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

INK, MUTED, GRID = "#1f2430", "#5d6472", "#e6e8ec"
COLOURS = {"base": "#85898f", "pretrain": "#85898f", "sft": "#0072b2", "reward": "#a8568a"}
COLOURS |= {"ppo": "#d55e00", "ppo-ptx": "#009e73", "prompted": "#8c6d31", "flan": "#cc79a7", "t0": "#c99700"}
COLOURS |= {"grpo": "#3a9bd9", "rloo": "#5d4a9c"}
OTHER_COLOURS = ("#7a5195", "#ef5675", "#2f8f9d", "#6b8e23")
PHASES = {"generation": "#2f4b6e", "shift": "#e0a526", "score": "#b5a7c9", "train": "#7d93ad", "other": "#dfe2e7"}
FONTS = ("Inter", "Source Sans 3", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans")

TEXT = 10.3  # points
WIDTH = 4.8  # inches; narrow, so that the text is still 11 pixels high where a phone shrinks the figure to its width
PERCENT = PercentFormatter(1.0)  # as many decimals as the ticks need
DPI = 200  # two pixels per logical pixel


def rc() -> Any:
    """matplotlib settings of every figure, {name: value}. Typed Any: matplotlib types its keys by name since 3.11."""
    installed = set(font_manager.get_font_names())
    return {
        "font.family": next(font for font in FONTS if font in installed),
        "font.size": TEXT,
        "text.color": INK,
        "text.parse_math": False,  # names of tasks and systems are words, also with a $ in them
        "axes.titlesize": TEXT + 0.5,
        "axes.titlelocation": "left",
        "axes.titlepad": 9,
        "axes.titlecolor": MUTED,
        "axes.edgecolor": "#b9bec7",
        "axes.labelcolor": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": "#b9bec7",
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "ytick.major.size": 0,
        "xtick.major.size": 3,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "figure.facecolor": "white",
        "axes.facecolor": "white",
    }


def new_figure(width: float = WIDTH, height: float = 3.4) -> Figure:
    """A figure without pyplot, so that a report leaves no state behind in the process."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def stacked(height: float, rows: int, columns: int = 1, **how: Any) -> tuple[Figure, list[Axes]]:
    """A figure of panels, row by row, with room between a panel's ticks and the title below them."""
    figure = new_figure(height=height)
    figure.set_layout_engine("constrained", hspace=0.09 if rows > 1 else 0.0)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **how).flat)


def styled() -> Any:
    """The context in which figures are both drawn and saved."""
    return matplotlib.rc_context(rc())


def colour(name: str, others: Sequence[str] = ()) -> str:
    """The colour of a run or system; `others` are the names on the same page that have no colour of their own."""
    if name in COLOURS:
        return COLOURS[name]
    return OTHER_COLOURS[list(others).index(name) % len(OTHER_COLOURS)] if name in others else COLOURS["sft"]


def text_colour(name: str, others: Sequence[str] = ()) -> str:
    """The same hue, dark enough for words on white (a contrast of 4.5 or more for the named systems)."""
    red, green, blue = colors.to_rgb(colour(name, others))
    return colors.to_hex((red * 0.78, green * 0.78, blue * 0.78))


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The centred mean over `window` values; fewer at both ends, so that it is as long as its input."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def window_for(count: int) -> int:
    """How many iterations a smoothed curve averages: one in twelve, odd, and none for short runs."""
    return 2 * (count // 24) + 1 if count >= 24 else 1


def curve(axes: Axes, x: Sequence[float], y: Sequence[float], name: str, *, smoothed: bool = True) -> list[float]:
    """Draw one run's curve: the values faint, their smoothed course strong. Returns the course that was drawn."""
    window = window_for(len(y)) if smoothed else 1
    course = smooth(y, window)
    if window > 1:
        axes.plot(x, y, color=colour(name), alpha=0.28, linewidth=0.9)
    marked = name == "ppo-ptx"
    every = max(1, len(y) // 10)
    axes.plot(
        x,
        course,
        color=colour(name),
        linewidth=2.0,
        marker="o" if marked or len(y) == 1 else None,
        markevery=every,
        markersize=4.6,
        markerfacecolor="white",
        markeredgewidth=1.3,
    )
    return course


def end_labels(axes: Axes, labels: Iterable[tuple[float, str, str]], size: float = TEXT) -> None:
    """Name curves at the right edge instead of in a legend: (y in data units, text, colour) each, moved apart until
    none covers another. Call after the axis limits are final."""
    low, high = axes.get_ylim()
    figure, place_in_grid = axes.get_figure(root=True), axes.get_subplotspec()
    if figure is None or place_in_grid is None:
        raise ValueError("end_labels needs axes made by subplots")
    inches = figure.get_size_inches()[1] * place_in_grid.get_position(figure).height
    gap = 1.3 * size / 72 / inches  # 1.3 lines, as a part of the axes' height
    entries = sorted(labels)
    places = spread([(y - low) / (high - low) for y, _, _ in entries], gap)
    axes.set_ylim(low, high)
    for place, (_, text, ink) in zip(places, entries, strict=True):
        axes.text(1.02, place, text, transform=axes.transAxes, color=ink, fontsize=size, va="center", weight="bold")


def point_labels(axes: Axes, points: Sequence[tuple[float, float, str, str]], size: float = TEXT - 1) -> None:
    """Name points beside them: (x, y, text, colour) each, moved apart in height where they would cover another's. Call
    after the axis limits are final."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    figure = axes.get_figure(root=True)
    place_in_grid = axes.get_subplotspec()
    if figure is None or place_in_grid is None:
        raise ValueError("point_labels needs axes made by subplots")
    width, height = figure.get_size_inches()
    gap = 1.25 * size / 72 / (height * place_in_grid.get_position(figure).height)
    reach = max((len(text) for _, _, text, _ in points), default=0) * 0.62 * size / 72 / width
    entries = sorted(((x - left) / (right - left), (y - low) / (high - low), text, ink) for x, y, text, ink in points)
    crowds: list[list[tuple[float, float, str, str]]] = []
    for entry in entries:
        near = crowds and entry[0] - crowds[-1][-1][0] < reach
        crowds[-1].append(entry) if near else crowds.append([entry])
    for crowd in crowds:
        right_of = max(x for x, *_ in crowd)
        crowd.sort(key=lambda entry: entry[1])
        for place, (_, _, text, ink) in zip(spread([y for _, y, *_ in crowd], gap), crowd, strict=True):
            axes.annotate(text, (right_of, place), (7, 0), axes.transAxes, textcoords="offset points", va="center",
                          color=ink, fontsize=size, weight="bold")  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move rising positions apart until neighbours are at least `gap` apart, keeping each crowd's centre."""
    merged: list[tuple[float, int]] = []  # (centre, members) of each crowd
    for place in places:
        merged.append((place, 1))
        while len(merged) > 1 and merged[-1][0] - merged[-2][0] < gap * (merged[-1][1] + merged[-2][1]) / 2 - 1e-9:
            (right, n), (left, m) = merged.pop(), merged.pop()
            merged.append(((right * n + left * m) / (n + m), n + m))
    return [centre + gap * (i - (n - 1) / 2) for centre, n in merged for i in range(n)]


def thousands(value: float, _: object = None) -> str:
    """An axis number as people write it: 20k, 1.5k, 500."""
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"
