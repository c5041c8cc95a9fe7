"""The figures of a report. Each takes the Material, draws from its numbers alone, and returns the figure with notes on
what it had to leave out; with nothing to draw it raises Missing, whose text the page shows instead."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from gearshift.launch.report import style
from gearshift.launch.report.material import Material, Run, Series, label
from gearshift.launch.report.measures import (
    EXPLAINED,
    HELDOUT,
    KL,
    SCORE,
    Missing,
    episodes_axis,
    having,
    is_share,
    kind_scores,
    phase_seconds,
)

REFERENCE_SYSTEMS = ("base", "sft")


@dataclass(frozen=True)
class Drawn:
    figure: Figure
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spec:
    """One figure of the page: `name` is its PNG file's, `caption` says how to read it."""

    name: str
    title: str
    caption: str
    draw: Callable[[Material], Drawn]


def smoothing_note(drawn: Sequence[Series]) -> tuple[str, ...]:
    """What the strong and the faint line are, if any of the series is long enough to be smoothed."""
    window = max(style.window_for(len(series)) for series in drawn)
    return (f"Strong line: mean of {window} neighbouring points; faint line: each one.",) if window > 1 else ()


def learning(material: Material) -> Drawn:
    """Score above, KL below, over episodes."""
    figure = style.new_figure(height=5.2)
    score_axes, kl_axes = figure.subplots(2, 1, sharex=True)
    return Drawn(figure, draw_learning(material, score_axes, kl_axes))


def draw_learning(material: Material, score_axes: Axes, kl_axes: Axes, size: float = style.TEXT) -> tuple[str, ...]:
    """Both curves on axes that share x. The x axis is iterations if a run did not count its episodes."""
    notes: list[str] = []
    panels = []
    for axes, metric, title in (
        (score_axes, SCORE, "Reward-model score"),
        (kl_axes, KL, "KL to the reference, nats per response"),
    ):
        found, left_out = having(material.policies(), metric)
        notes += left_out
        panels.append((axes, metric, title, found))
    every = [(run, series) for *_, found in panels for run, series in found]
    counted = all(episodes_axis(run, series) for run, series in every)
    for axes, metric, title, found in panels:
        ends = []
        for run, series in found:
            x = (episodes_axis(run, series) if counted else None) or list(series.steps)
            ends.append((style.curve(axes, x, series.values, run.name)[-1], run))
        axes.set_title(title)
        if metric == KL:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        _label_ends(axes, ends, len(found) > 1, size)
    x_axis(kl_axes, "episodes" if counted else "PPO iterations")
    score_axes.tick_params(labelbottom=False)
    return (*smoothing_note([series for _, series in every]), *notes)


def true_scores(material: Material) -> Drawn:
    """The systems' true scores, and below them the same for each kind of task."""
    kinds = kind_scores(material)
    systems = material.systems_with("true_score")
    rows = len(kinds) * max(1, len(systems))
    heights = [0.42 * len(systems) + 0.5] + ([0.13 * rows + 0.18 * len(kinds) + 0.5] if kinds else [])
    figure = style.new_figure(height=max(2.2, min(6.0, sum(heights) + 0.2)))
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    draw_true_scores(material, panels[0])
    if kinds:
        _draw_kinds(material, kinds, systems, panels[1])
        panels[0].tick_params(labelbottom=False)
    return Drawn(figure, () if kinds else ("The answers name no kind of task.",))


def draw_true_scores(material: Material, axes: Axes) -> None:
    """One bar per system with its 95% interval and its value."""
    systems = material.systems_with("true_score")
    if not systems:
        raise Missing("systems.json has no true_score")
    others = [name for name in systems if name not in style.COLOURS]
    share = is_share(material)
    for row, name in enumerate(systems):
        value = material.system_value(name, "true_score") or 0.0
        interval = material.system_value(name, "true_score_ci95") or 0.0
        axes.barh(row, value, height=0.62, color=style.colour(name, others))
        axes.errorbar(value, row, xerr=interval, color=style.INK, elinewidth=1.3, capsize=3, capthick=1.3)
        text = f"{value:.1%}" if share else f"{value:.3g}"
        edge = value + interval
        axes.annotate(text, (edge, row), (6, 0), textcoords="offset points", va="center", weight="bold")
    axes.set_yticks(range(len(systems)), [label(name) for name in systems], color=style.INK)
    axes.set_title("Share of right answers" if share else "True score")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    if share:
        axes.set_xlim(0, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _draw_kinds(
    material: Material, kinds: dict[str, dict[str, tuple[float, float]]], systems: Sequence[str], axes: Axes
) -> None:
    others = [name for name in material.systems if name not in style.COLOURS]
    count = len(systems)
    for row, values in enumerate(kinds.values()):
        for place, name in enumerate(systems):
            if name in values:
                mean, interval = values[name]
                y = row + (place - (count - 1) / 2) * 0.68 / max(1, count)
                ink = style.colour(name, others)
                axes.plot([mean - interval, mean + interval], [y, y], color=ink, linewidth=1.4, alpha=0.65)
                axes.plot(mean, y, "o", color=ink, markersize=5)
    for edge in range(1, len(kinds)):
        axes.axhline(edge - 0.5, color=style.GRID, linewidth=0.8)
    axes.set_yticks(range(len(kinds)), list(kinds), color=style.INK)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_title("By kind of task")
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")


def pretraining_loss(material: Material) -> Drawn:
    """Loss on held-out pretraining text over iterations, with the base and SFT models as lines."""
    figure = style.new_figure(height=3.7)
    return Drawn(figure, draw_pretraining_loss(material, figure.subplots()))


def draw_pretraining_loss(material: Material, axes: Axes, size: float = style.TEXT) -> tuple[str, ...]:
    found, notes = having(material.policies(), HELDOUT)
    ends, dashed = [], []
    for run, series in found:
        course = style.curve(axes, series.steps, series.values, run.name, smoothed=False)
        ends.append((course[-1], run.label, style.text_colour(run.name)))
    for name in REFERENCE_SYSTEMS:
        if (value := material.system_value(name, "pretraining_loss")) is not None:
            axes.axhline(value, color=style.colour(name), linewidth=1.4, linestyle=(0, (4, 3)))
            ends.append((value, label(name), style.text_colour(name)))
            dashed.append(label(name))
        elif material.systems:
            notes += (f"systems.json has no pretraining_loss for {name}.",)
    if dashed:
        notes += (f"Dashed: {' and '.join(dashed)}, as the comparison measured them.",)
    axes.set_title("Loss on pretraining text, nats a token")
    axes.margins(y=0.08)
    style.end_labels(axes, ends if len(ends) > 1 else [], size)
    x_axis(axes, "PPO iterations")
    return notes


def explained_variance(material: Material) -> Drawn:
    """How much of the returns' variance the critic predicts."""
    figure = style.new_figure(height=3.7)
    axes = figure.subplots()
    found, notes = having(material.policies(), EXPLAINED)
    ends = [(style.curve(axes, series.steps, series.values, run.name)[-1], run) for run, series in found]
    axes.set_title("Explained variance of the critic")
    axes.set_ylim(max(-1.0, min(0.0, axes.get_ylim()[0])), 1.0)
    if any(value < -1 for _, series in found for value in series.values):
        notes += ("Values below -1 are not shown.",)  # a fresh critic can start far below: they would flatten the rest
    _label_ends(axes, ends, len(found) > 1)
    x_axis(axes, "PPO iterations")
    return Drawn(figure, (*smoothing_note([series for _, series in found]), *notes))


def phases(material: Material) -> Drawn:
    """Seconds per iteration, stacked by phase, one panel per run."""
    timed, notes = [], []
    for run in material.policies():
        try:
            timed.append((run, *phase_seconds(run)))
        except Missing as missing:
            notes.append(f"{missing}.")
    if not timed:
        raise Missing(" ".join(notes).rstrip(".") or "no PPO run")
    figure = style.new_figure(height=3.9)
    panels = figure.subplots(1, len(timed), sharey=True, squeeze=False)[0]
    shown = dict.fromkeys(phase for _, _, seconds in timed for phase in seconds)
    for axes, (run, steps, seconds) in zip(panels, timed, strict=True):
        x = list(steps) if len(steps) > 1 else [steps[0] - 0.5, steps[0] + 0.5]
        heights = [series if len(steps) > 1 else series * 2 for series in seconds.values()]
        axes.stackplot(x, heights, colors=[style.PHASES[phase] for phase in seconds], linewidth=0)
        axes.set_title(f"{run.label}, seconds per iteration" if len(timed) == 1 else f"{run.label}, seconds")
        axes.margins(x=0)
        x_axis(axes, "PPO iterations")
    handles = [panels[0].fill_between([], [], color=style.PHASES[phase], label=phase) for phase in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=0.9, handleheight=0.9)
    return Drawn(figure, tuple(notes))


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
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title(f"{run.label}, accuracy on pairs")


def _label_ends(axes: Axes, ends: Sequence[tuple[float, Run]], wanted: bool, size: float = style.TEXT) -> None:
    style.end_labels(axes, [(y, run.label, style.text_colour(run.name)) for y, run in ends] if wanted else [], size)


def x_axis(axes: Axes, text: str) -> None:
    axes.set_xlabel(text)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(style.thousands))


POLICY_FIGURES = (
    Spec("learning", "Reward and KL", "Means over each iteration's episodes.", learning),
    Spec(
        "pretraining_loss",
        "What it costs on pretraining text",
        "Lower is better.",
        pretraining_loss,
    ),
    Spec(
        "explained_variance",
        "Critic",
        "The share of the returns' variance that the values predict, over an iteration's response tokens.",
        explained_variance,
    ),
    Spec(
        "phases",
        "Time per phase",
        "Shift: moving the ZeRO-3 shards into the tensor-parallel replica. Score: reward model, reference and critic.",
        phases,
    ),
)
SYSTEM_FIGURES = (
    Spec(
        "true_scores",
        "True score on held-out prompts",
        "Bars and dots: means; whiskers: 95% intervals. Dots have the colours of the bars.",
        true_scores,
    ),
)
STAGE_FIGURES = (
    Spec("stages", "Base model, SFT and reward model", "Validation rows are never trained on.", stage_losses),
)
