"""What the figures share: what one is, and the habits of axes, notes and labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gearshift.launch.report import style
from gearshift.launch.report.material import Material, Run, Series


@dataclass(frozen=True)
class Drawn:
    figure: Figure
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spec:
    """One figure of the page: `name` is its PNG file's, `caption` says how to read it. With nothing to draw, an
    `optional` one is left out in silence: what it shows is not logged by every run."""

    name: str
    title: str
    caption: str
    draw: Callable[[Material], Drawn]
    optional: bool = False


def smoothing_note(drawn: Sequence[Series]) -> tuple[str, ...]:
    """What the strong and the faint line are, if any of the series is long enough to be smoothed."""
    window = max(style.window_for(len(series)) for series in drawn)
    return (f"Strong line: mean of {window} neighbouring points; faint line: each one.",) if window > 1 else ()


def label_ends(axes: Axes, ends: Sequence[tuple[float, Run]], wanted: bool, size: float = style.TEXT) -> None:
    """Names each run's curve at its last value."""
    style.end_labels(axes, [(y, run.label, style.text_colour(run.name)) for y, run in ends] if wanted else [], size)


def x_axis(axes: Axes, text: str) -> None:
    axes.set_xlabel(text)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(style.thousands))
