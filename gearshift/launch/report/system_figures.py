"""The figures of a comparison: one row or one point per system, with its interval where it has one."""

from collections.abc import Sequence
from math import sqrt

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from gearshift.launch.report import style
from gearshift.launch.report.drawing import Drawn, Spec
from gearshift.launch.report.material import Material, label
from gearshift.launch.report.measures import Missing, is_share, kind_scores

TEXT_FIGURES = (
    ("pretraining_loss", "Loss on pretraining text"),
    ("length", "Length, tokens"),
    ("eos_rate", "EOS rate"),
    ("distinct_1", "Distinct-1"),
    ("distinct_2", "Distinct-2"),
)


def true_scores(material: Material) -> Drawn:
    """The systems' true scores, and below them the same for each kind of task."""
    kinds = kind_scores(material)
    systems = material.systems_with("true_score")
    rows = len(kinds) * max(1, len(systems))
    heights = [0.42 * len(systems) + 0.5] + ([0.13 * rows + 0.18 * len(kinds) + 0.5] if kinds else [])
    figure = style.new_figure(height=max(2.2, min(9.0, sum(heights) + 0.2)))
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
    others = material.uncoloured()
    share = is_share(material)
    for row, name in enumerate(systems):
        value = material.system_value(name, "true_score") or 0.0
        low, high = material.interval(name, "true_score") or (value, value)
        axes.barh(row, value, height=0.62, color=style.colour(name, others))
        whiskers = [[value - low], [high - value]]
        axes.errorbar(value, row, xerr=whiskers, color=style.INK, elinewidth=1.3, capsize=3, capthick=1.3)
        text = f"{value:.1%}" if share else f"{value:.3g}"
        axes.annotate(text, (high, row), (6, 0), textcoords="offset points", va="center", weight="bold")
    axes.set_yticks(range(len(systems)), [label(name) for name in systems], color=style.INK)
    axes.set_title("Share of right answers" if share else "True score")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    if share:
        axes.set_xlim(0, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
        axes.xaxis.set_major_formatter(style.PERCENT)


def _draw_kinds(
    material: Material, kinds: dict[str, dict[str, tuple[float, float]]], systems: Sequence[str], axes: Axes
) -> None:
    others = material.uncoloured()
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


def scores(material: Material) -> Drawn:
    """Reward-model scores, and win rates against one system, with their intervals."""
    panels = [("score", "Reward-model score", False)]
    against = next((s["against"] for s in material.systems.values() if s.get("against")), None)
    for key, by in (("win_rate", "reward-model score"), ("true_win_rate", "true score")):
        if material.systems_with(key):
            panels.append((key, f"Wins against {label(str(against))} by {by}", True))
    if not material.systems_with("score"):
        raise Missing("systems.json has no score")
    rows = len(material.systems)
    figure, grid = style.stacked((0.27 * rows + 0.75) * len(panels), len(panels))
    for axes, (key, title, share) in zip(grid, panels, strict=True):
        draw_dots(material, key, axes)
        axes.set_title(title)
        if share:
            axes.axvline(0.5, color=style.MUTED, linewidth=1, linestyle=(0, (4, 3)))
            axes.set_xlim(0, 1)
            axes.xaxis.set_major_formatter(style.PERCENT)
    return Drawn(figure)


def draw_dots(material: Material, key: str, axes: Axes, named: bool = True, bins: int = 4) -> None:
    """One row per system that has the figure: a dot and, where it has one, its interval."""
    systems, others = material.systems_with(key), material.uncoloured()
    for row, name in enumerate(systems):
        value, ink = material.systems[name][key], style.colour(name, others)
        if ends := material.interval(name, key):
            axes.plot(ends, [row, row], color=ink, linewidth=2.2, alpha=0.55)
        axes.plot(value, row, "o", color=ink, markersize=6.5)
    axes.set_yticks(range(len(systems)), [label(name) if named else "" for name in systems], color=style.INK)
    axes.set_ylim(len(systems) - 0.5, -0.5)
    axes.grid(visible=True, axis="both")
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(bins))


def against_kl(material: Material) -> Drawn:
    """Each system's score, and its true score where it has one, against the root of its KL."""
    keys = [key for key in ("true_score", "score") if material.systems_with(key)]
    if not keys or not material.systems_with("kl"):
        raise Missing("systems.json has no score with a kl")
    titles = {"true_score": "Right answers" if is_share(material) else "True score", "score": "Reward-model score"}
    figure, panels = style.stacked(2.6 * len(keys) + 0.4, len(keys), sharex=True)
    points = [_draw_against_kl(material, key, axes) for axes, key in zip(panels, keys, strict=True)]
    panels[0].set_xlim(right=panels[0].get_xlim()[1] * 1.12)  # of both, and before the labels, which it moves
    for axes, key, named in zip(panels, keys, points, strict=True):
        style.point_labels(axes, named)
        axes.set_title(titles[key])
        if key == "true_score" and is_share(material):
            axes.yaxis.set_major_formatter(style.PERCENT)
    panels[-1].set_xlabel("√KL to the reference, of nats per response")
    return Drawn(figure)


def _draw_against_kl(material: Material, key: str, axes: Axes) -> list[tuple[float, float, str, str]]:
    """Draws the points; returns what their labels need."""
    others = material.uncoloured()
    points = []
    for name in material.systems_with(key):
        kl, value = material.system_value(name, "kl"), material.system_value(name, key)
        if kl is None or value is None:
            continue
        x, ink = sqrt(max(0.0, kl)), style.colour(name, others)
        if ends := material.interval(name, key):
            axes.plot([x, x], ends, color=ink, linewidth=2.2, alpha=0.55)
        axes.plot(x, value, "o", color=ink, markersize=6.5)
        points.append((x, value, label(name), style.text_colour(name, others)))
    axes.margins(0.12)
    return points


def texts(material: Material) -> Drawn:
    """What the systems' text is like: loss on pretraining text, length, endings, variety."""
    found = [(key, title) for key, title in TEXT_FIGURES if material.systems_with(key)]
    if not found:
        raise Missing("systems.json has none of " + ", ".join(key for key, _ in TEXT_FIGURES))
    lines = -(-len(found) // 2)
    figure, grid = style.stacked((0.24 * len(material.systems) + 0.75) * lines, lines, 2)
    for place, (key, title) in enumerate(found):
        axes = grid[place]
        # Names stand once a line, beside the first panel: both panels must then show the same systems.
        same = place % 2 == 1 and material.systems_with(key) == material.systems_with(found[place - 1][0])
        draw_dots(material, key, axes, named=not same, bins=2)
        axes.set_title(title)
    for axes in grid[len(found) :]:
        axes.set_axis_off()
    return Drawn(figure)


SYSTEM_FIGURES = (
    Spec(
        "true_scores",
        "True score on held-out prompts",
        "Bars and dots: means; whiskers: 95% intervals. Dots have the colours of the bars.",
        true_scores,
    ),
    Spec(
        "scores",
        "What the reward model says",
        "Lines: 95% bootstrap intervals over prompts. A tie is half a win.",
        scores,
    ),
    Spec("systems_kl", "Scores against √KL", "Lines: 95% intervals.", against_kl),
    Spec(
        "texts",
        "What they write",
        "Distinct-n: different n-grams of words in all answers, over all their words (Li et al. 2016).",
        texts,
    ),
)
