"""Every other metric of a single run, as small panels: what a page of one run shows besides the named figures."""

from collections import defaultdict
from math import ceil

from gearshift.launch.report import style
from gearshift.launch.report.drawing import Drawn, Spec, smoothing_note, x_axis
from gearshift.launch.report.material import Material, Run
from gearshift.launch.report.measures import EPISODES, EXPLAINED, HELDOUT, KL, PANELS, PHASES, SCORE, Missing

SHOWN_ELSEWHERE = {SCORE, KL, EPISODES, HELDOUT, EXPLAINED, "loss/train", "loss/validation", "reward/accuracy"}
SHOWN_ELSEWHERE |= {f"timing/{phase}" for phase in PHASES}
SHOWN_ELSEWHERE |= {panel.metric for panels in PANELS.values() for panel in panels}


def other_metrics(run: Run) -> dict[str, list[str]]:
    """{first part of the name: metrics} of every metric that has a number and no figure of its own."""
    groups: dict[str, list[str]] = defaultdict(list)
    for metric in run.names():
        if metric not in SHOWN_ELSEWHERE and run.series(metric):
            groups[metric.split("/")[0]].append(metric)
    return dict(groups)


def single_figures(material: Material) -> tuple[Spec, ...]:
    """One figure per group of metrics."""
    run = next(iter(material.runs.values()))
    return tuple(
        Spec(_file_name(group), group, "", lambda _, names=names: _panels(run, names))  # type: ignore[misc]
        for group, names in other_metrics(run).items()
    )


def _file_name(group: str) -> str:
    return "metrics_" + "".join(letter if letter.isalnum() else "_" for letter in group)


def _panels(run: Run, metrics: list[str]) -> Drawn:
    columns = min(2, len(metrics))
    rows = ceil(len(metrics) / columns)
    figure = style.new_figure(height=1.9 * rows + 0.3 if len(metrics) > 1 else 3.0)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, metric in zip(panels, metrics, strict=False):
        series = run.series(metric)
        if series is None:
            raise Missing(f"{run.label} has no {metric}")
        style.curve(axes, series.steps, series.values, run.name)
        axes.set_title(metric.split("/", 1)[-1], fontsize=style.TEXT - 0.5)
        axes.margins(y=0.1)
        x_axis(axes, "")
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    return Drawn(figure, smoothing_note([series for metric in metrics if (series := run.series(metric))]))
