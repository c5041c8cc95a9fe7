"""The figures of PPO runs. Each takes the Material, draws from its numbers alone, and returns the figure with notes on
what it had to leave out; with nothing to draw it raises Missing, whose text the page shows instead."""

from collections.abc import Callable
from math import sqrt

from matplotlib.axes import Axes

from gearshift.launch.report import style
from gearshift.launch.report.drawing import Drawn, Spec, label_ends, smoothing_note, x_axis
from gearshift.launch.report.material import Material, label
from gearshift.launch.report.measures import (
    EXPLAINED,
    HELDOUT,
    KL,
    PANELS,
    SCORE,
    Missing,
    Panel,
    episodes_axis,
    having,
    paired,
    phase_seconds,
)

REFERENCE_SYSTEMS = ("base", "sft")


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
        label_ends(axes, ends, len(found) > 1, size)
    x_axis(kl_axes, "episodes" if counted else "PPO iterations")
    score_axes.tick_params(labelbottom=False)
    return (*smoothing_note([series for _, series in every]), *notes)


def over_optimisation(material: Material) -> Drawn:
    """Score against the root of the KL: where a policy goes on in KL and not in what the KL was spent for."""
    figure = style.new_figure(height=3.7)
    axes = figure.subplots()
    drawn, ends = [], []
    for run in material.policies():
        scores, kl = paired(run, SCORE, KL)
        if not scores:
            continue
        drawn.append(scores)
        window = 2 * style.window_for(len(scores)) - 1  # wider than a curve over time: both of its axes are noisy
        x = [sqrt(max(0.0, value)) for value in style.smooth(kl.values, window)]
        y = style.smooth(scores.values, window)
        axes.plot(x, y, color=style.colour(run.name), linewidth=1.8, alpha=0.9)
        axes.plot(x[0], y[0], "o", color=style.colour(run.name), markersize=5.5, markerfacecolor="white")
        axes.plot(x[-1], y[-1], "o", color=style.colour(run.name), markersize=6.5)
        ends.append((y[-1], run))
    if not drawn:
        raise Missing(f"no run here logged both {SCORE} and {KL}")
    axes.set_title("Reward-model score")
    axes.set_xlim(left=0)
    label_ends(axes, ends, len(ends) > 1)
    axes.set_xlabel("√KL to the reference, of nats per response")
    window = max(2 * style.window_for(len(series)) - 1 for series in drawn)
    smoothed = (f"Means of {window} neighbouring iterations.",) if window > 1 else ()
    return Drawn(figure, ("Hollow: first iteration; full: last.", *smoothed))


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
    label_ends(axes, ends, len(found) > 1)
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


def panels(name: str) -> Callable[[Material], Drawn]:
    """The figure that draws the panels of `measures.PANELS[name]`, one below the other; those that no run logged are
    left out, and if that is all of them the figure is Missing."""

    def draw(material: Material) -> Drawn:
        runs = material.policies()
        found = [panel for panel in PANELS[name] if any(run.series(panel.metric) for run in runs)]
        if not found:
            raise Missing(f"no run here logged {' or '.join(panel.metric for panel in PANELS[name])}")
        figure, grid = style.stacked(1.0 + 1.75 * len(found) if len(found) > 1 else 3.4, len(found), sharex=True)
        notes: dict[str, None] = {}
        for axes, panel in zip(grid, found, strict=True):
            notes |= dict.fromkeys(_draw_panel(material, panel, axes))
        x_axis(grid[-1], "PPO iterations")
        for axes in grid[:-1]:
            axes.tick_params(labelbottom=False)
        return Drawn(figure, tuple(notes))

    return draw


def _draw_panel(material: Material, panel: Panel, axes: Axes) -> tuple[str, ...]:
    found, notes = having(material.policies(), panel.metric)
    ends = [(style.curve(axes, series.steps, series.values, run.name)[-1], run) for run, series in found]
    axes.set_title(panel.title)
    axes.margins(y=0.1)
    if panel.share:
        axes.yaxis.set_major_formatter(style.PERCENT)
    if panel.from_zero:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    label_ends(axes, ends, len(found) > 1)
    return (*smoothing_note([series for _, series in found]), *notes)


POLICY_FIGURES = (
    Spec("learning", "Reward and KL", "Means over each iteration's episodes.", learning),
    Spec(
        "over_optimisation",
        "Reward against √KL",
        "A curve that goes right without going up pays KL for nothing; against a true score, one that turns down is "
        "over-optimised (Gao et al. 2022).",
        over_optimisation,
    ),
    Spec("pretraining_loss", "What it costs on pretraining text", "Lower is better.", pretraining_loss),
    Spec("entropy", "Entropy", "Of the policy's own distribution, on what it samples.", panels("entropy")),
    Spec("lengths", "Answers", "Ended: by EOS or a stop text, not at the limit.", panels("lengths")),
    Spec(
        "clipping",
        "How far an update moves",
        "The part of tokens whose ratio, or value, was clipped; and the approximate KL of an update.",
        panels("clipping"),
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
    Spec("memory", "Memory", "The most that a rank held at once.", panels("memory"), optional=True),
)
