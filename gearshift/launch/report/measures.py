"""The numbers behind the figures, taken from a Material without drawing anything."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from gearshift.launch.report.material import Material, Run, Series, is_number

SCORE, KL, EPISODES = "objective/scores", "objective/kl", "objective/episodes"
HELDOUT, EXPLAINED = "loss/pretraining_heldout", "critic/explained_variance"
ENTROPY, OBJECTIVE_ENTROPY = "policy/entropy_avg", "objective/entropy"
PHASES = ("generation", "shift", "score", "train")


@dataclass(frozen=True)
class Panel:
    """One metric over iterations. `share`: shown in per cent; `from_zero`: its axis holds 0."""

    metric: str
    title: str
    share: bool = False
    from_zero: bool = True


PANELS = {
    "entropy": (
        Panel(ENTROPY, "Entropy, nats a token"),
        Panel(OBJECTIVE_ENTROPY, "Minus log-probability of an answer, nats"),
    ),
    "lengths": (
        Panel("rollout/length", "Length, tokens"),
        Panel("rollout/finished", "Answers that ended", share=True, from_zero=False),
    ),
    "clipping": (
        Panel("policy/clipfrac_avg", "Policy: ratios clipped", share=True),
        Panel("critic/clipfrac_avg", "Critic: values clipped", share=True),
        Panel("policy/approxkl_avg", "Approximate KL of an update, nats a token"),
    ),
    "memory": (Panel("memory/peak_gib", "Peak memory of a rank, GiB"),),
}


class Missing(Exception):
    """A figure has nothing to show; the message names what is not in the files."""


def having(runs: Sequence[Run], metric: str) -> tuple[list[tuple[Run, Series]], tuple[str, ...]]:
    """The runs that logged a metric, with its values, and a note for each run that did not. Missing if none did."""
    found = [(run, series) for run in runs if (series := run.series(metric))]
    if not found:
        raise Missing(f"no run here logged {metric}")
    absent = [run.label for run in runs if run.series(metric) is None]
    return found, tuple(f"{name} has no {metric}." for name in absent)


def episodes_axis(run: Run, series: Series) -> list[float] | None:
    """The number of episodes done at each step of a series, or None if the run did not log it for every one."""
    episodes = run.series(EPISODES)
    at = dict(zip(episodes.steps, episodes.values, strict=True)) if episodes else {}
    return [at[step] for step in series.steps] if all(step in at for step in series.steps) else None


def paired(run: Run, one: str, other: str) -> tuple[Series, Series]:
    """Two metrics at the steps at which both were logged; empty if there are none."""
    first, second = (run.series(metric) or Series((), ()) for metric in (one, other))
    at, also = dict(zip(first.steps, first.values, strict=True)), dict(zip(second.steps, second.values, strict=True))
    steps = tuple(step for step in first.steps if step in also)
    return Series(steps, tuple(at[step] for step in steps)), Series(steps, tuple(also[step] for step in steps))


def phase_seconds(run: Run) -> tuple[tuple[int, ...], dict[str, list[float]]]:
    """Steps, and seconds per phase at each of them; what timing/step holds beyond the phases is `other`.

    Only steps that have every phase count. Missing if there are none.
    """
    logged = {phase: run.series(f"timing/{phase}") for phase in PHASES}
    if absent := [f"timing/{phase}" for phase, series in logged.items() if series is None]:
        raise Missing(f"{run.label} has no {', '.join(absent)}")
    at = {phase: dict(zip(s.steps, s.values, strict=True)) for phase, s in logged.items() if s}
    steps = tuple(step for step in at["generation"] if all(step in at[phase] for phase in PHASES))
    if not steps:
        raise Missing(f"{run.label} has no iteration with all of {', '.join(PHASES)}")
    seconds = {phase: [at[phase][step] for step in steps] for phase in PHASES}
    if whole := run.series("timing/step"):
        total = dict(zip(whole.steps, whole.values, strict=True))
        known = [sum(seconds[phase][i] for phase in PHASES) for i in range(len(steps))]
        seconds["other"] = [max(0.0, total.get(step, part) - part) for step, part in zip(steps, known, strict=True)]
    return steps, seconds


def kind_scores(material: Material) -> dict[str, dict[str, tuple[float, float]]]:
    """{kind of task: {system: (mean true score, half of its 95% interval)}} from the answers; {} if they name no kind.

    The interval is the normal one, 1.96·s/√n over the answers of that kind.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    for answer in material.answers:
        score = answer.get("true_score")
        if "kind" in answer and (is_number(score) or isinstance(score, bool)):
            scores.setdefault(str(answer["kind"]), {}).setdefault(answer["system"], []).append(float(score))
    return {
        kind: {name: (fmean(v), 1.96 * stdev(v) / sqrt(len(v)) if len(v) > 1 else 0.0) for name, v in found.items()}
        for kind, found in sorted(scores.items())
    }


def is_share(material: Material) -> bool:
    """True if every system's true score lies in [0, 1], where it reads as a share of right answers."""
    values = [material.system_value(name, "true_score") for name in material.systems]
    return all(0 <= value <= 1 for value in values if value is not None)
