"""The figure of stages that are trained on given data: base model, SFT, reward model."""

from math import ceil

from matplotlib.axes import Axes

from gearshift.launch.report import style
from gearshift.launch.report.drawing import Drawn, Spec, x_axis
from gearshift.launch.report.material import Material, Run
from gearshift.launch.report.measures import Missing


def stage_losses(material: Material) -> Drawn:
    """Training and validation loss of each stage, and the reward model's accuracy on held-out pairs."""
    panels = [(run, "loss") for run in material.stages() if run.series("loss/train") or run.series("loss/validation")]
    notes = [f"{run.label} has no loss/train." for run in material.stages() if not run.series("loss/train")]
    for run in material.stages():
        if run.series("reward/accuracy"):
            panels.append((run, "accuracy"))
        elif run.name == "reward":
            notes.append("Reward model has no reward/accuracy.")
    if not panels:
        raise Missing("no stage here logged loss/train, loss/validation or reward/accuracy")
    rows = ceil(len(panels) / 2)
    figure = style.new_figure(height=2.35 * rows + 0.35 if len(panels) > 1 else 3.4)
    figure.set_layout_engine("constrained", hspace=0.08)  # of a row; else one row's axis label touches the next title
    grid = figure.subplots(rows, min(2, len(panels)), squeeze=False).flat
    for axes, (run, what) in zip(grid, panels, strict=False):
        (_draw_loss if what == "loss" else _draw_accuracy)(run, axes)
        x_axis(axes, "steps")
    for axes in list(grid)[len(panels) :]:
        axes.set_axis_off()
    return Drawn(figure, tuple(notes))


def _draw_loss(run: Run, axes: Axes) -> None:
    ink = style.text_colour(run.name)
    if train := run.series("loss/train"):
        axes.plot(train.steps, train.values, color=style.colour(run.name), alpha=0.45, linewidth=1.2, label="training")
    if valid := run.series("loss/validation"):
        line = {"color": ink, "linewidth": 1.8, "marker": "o", "markersize": 4.2, "markerfacecolor": "white"}
        axes.plot(valid.steps, valid.values, **line, label="validation")  # type: ignore[arg-type]
    axes.set_title(f"{run.label}, loss")
    axes.legend(loc="upper right", fontsize=8.5, handlelength=1.5, labelcolor=style.MUTED)


def _draw_accuracy(run: Run, axes: Axes) -> None:
    series = run.series("reward/accuracy")
    assert series is not None  # the caller chose this panel by it
    ink = style.text_colour(run.name)
    axes.plot(
        series.steps, series.values, color=ink, linewidth=1.8, marker="o", markersize=4.2, markerfacecolor="white"
    )
    axes.axhline(0.5, color=style.MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate("chance", (1, 0.5), (-2, 3), axes.get_yaxis_transform(), textcoords="offset points", ha="right",
                  color=style.MUTED, fontsize=8.5)  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_ylim(min(0.45, min(series.values) - 0.03), 1.0)
    axes.yaxis.set_major_formatter(style.PERCENT)
    axes.set_title(f"{run.label}, accuracy")


STAGE_FIGURES = (
    Spec(
        "stages",
        "Stages trained on given data",
        "Validation rows are never trained on. Accuracy is on held-out pairs.",
        stage_losses,
    ),
)
