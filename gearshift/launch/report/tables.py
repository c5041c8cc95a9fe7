"""The page's tables and sentences as plain values, ready for the template. Numbers come from the files alone."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gearshift.launch.report import style
from gearshift.launch.report.material import Material, Run, is_number, label
from gearshift.launch.report.measures import is_share

NONE = "\N{EN DASH}"  # what a table shows where there is no number
PROMPTS_SHOWN = 12
SAMPLES_SHOWN = 8  # of the first and of the last logged step each
COLUMNS = (  # key in systems.json, heading, decimals
    ("true_score", "True score", 3),
    ("score", "Reward score", 2),
    ("kl", "KL, nats", 2),
    ("length", "Length, tokens", 1),
    ("pretraining_loss", "Pretraining loss, nats per token", 3),
)


@dataclass(frozen=True)
class SystemRow:
    """One system: `cells` in the order of `system_columns`."""

    name: str
    label: str
    colour: str
    cells: list[str]
    true_score: str  # with its unit, "" if not known
    interval: str  # "± …", "" if not known


@dataclass(frozen=True)
class Cell:
    """One system's answer. `verdict` is "right", "wrong", the true score in between as a number, or ""."""

    label: str
    colour: str
    response: str
    verdict: str
    details: str


@dataclass(frozen=True)
class PromptRow:
    prompt: str
    kind: str
    cells: list[Cell]


@dataclass(frozen=True)
class Timing:
    label: str
    text: str
    percent: float  # of the longest stage, 0..100


def colour(material: Material, name: str) -> str:
    return style.colour(name, [other for other in material.systems if other not in style.COLOURS])


def system_columns(material: Material) -> list[tuple[str, str, int]]:
    """(key, heading, decimals) of the columns for which at least one system has a number."""
    return [column for column in COLUMNS if material.systems_with(column[0])]


def system_rows(material: Material) -> list[SystemRow]:
    columns = system_columns(material)
    rows = []
    for name in material.systems:
        score, interval = _true_score(material, name)
        cells = [
            f"{score} {interval}".strip() if key == "true_score" else _fixed(material.system_value(name, key), decimals)
            for key, _, decimals in columns
        ]
        rows.append(SystemRow(name, label(name), colour(material, name), cells, score, interval))
    return rows


def _fixed(value: float | None, decimals: int) -> str:
    return NONE if value is None else f"{value:.{decimals}f}"


def _true_score(material: Material, name: str) -> tuple[str, str]:
    value = material.system_value(name, "true_score")
    if value is None:
        return NONE, ""
    show = (lambda v: f"{v:.1%}") if is_share(material) else number
    ends = material.interval(name, "true_score")
    return show(value), "" if ends is None else f"{show(ends[0])} to {show(ends[1])}"


def number(value: Any) -> str:
    """A number for a table: three decimals below 100, fewer above; a dash for none."""
    if not is_number(value):
        return NONE
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.3f}" if 1e-3 <= abs(value) < 100 else f"{value:.1f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def headline(material: Material) -> list[str]:
    """Sentences that say how the systems came out, whichever way that is."""
    sentences = []
    if scored := material.systems_with("true_score"):
        parts = [f"{label(name)} {_true_score(material, name)[0]}" for name in scored]
        prompts = len({answer["id"] for answer in material.answers})
        where = f"On {prompts:,} held-out prompts" if prompts else "On held-out prompts"
        what = "right answers" if is_share(material) else "mean true score"
        sentences.append(f"{where}, {what}: {_and(parts)}.")
    if lossy := material.systems_with("pretraining_loss"):
        parts = [f"{label(name)} {material.system_value(name, 'pretraining_loss'):.3f}" for name in lossy]
        sentences.append(f"Loss on held-out pretraining text: {_and(parts)} nats per token.")
    return sentences


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def prompt_rows(material: Material, limit: int = PROMPTS_SHOWN) -> list[PromptRow]:
    """The answers of all systems to the same prompts: the first prompts of each kind of task, in turn, in the order of
    the file, of those that every system answered. Nothing is chosen by how the answers came out."""
    systems = [name for name in material.systems if any(answer["system"] == name for answer in material.answers)]
    systems = systems or list(dict.fromkeys(answer["system"] for answer in material.answers))
    by_id: dict[Any, dict[str, dict[str, Any]]] = defaultdict(dict)
    for answer in material.answers:
        by_id[answer["id"]].setdefault(answer["system"], answer)
    queues: dict[str, list[dict[str, dict[str, Any]]]] = defaultdict(list)
    for answers in by_id.values():
        if all(name in answers for name in systems):
            queues[str(answers[systems[0]].get("kind", ""))].append(answers)
    chosen: list[tuple[str, dict[str, dict[str, Any]]]] = []
    for turn in range(max(map(len, queues.values()), default=0)):
        chosen += [(kind, queue[turn]) for kind, queue in queues.items() if turn < len(queue)]
    return [
        PromptRow(answers[systems[0]]["prompt"], kind, [_cell(material, answers[name]) for name in systems])
        for kind, answers in chosen[:limit]
    ]


def _cell(material: Material, answer: dict[str, Any]) -> Cell:
    name = str(answer["system"])
    return Cell(label(name), colour(material, name), str(answer["response"]), _verdict(answer), _details(answer))


def _verdict(answer: dict[str, Any]) -> str:
    score = answer.get("true_score")
    if isinstance(score, bool) or (is_number(score) and score in (0, 1)):
        return "right" if score else "wrong"
    return number(score) if is_number(score) else ""


def _details(answer: dict[str, Any]) -> str:
    parts = [
        f"{name}\N{NO-BREAK SPACE}{answer[key]:.2f}"
        for key, name in (("score", "score"), ("kl", "KL"))
        if is_number(answer.get(key))
    ]
    return " · ".join(parts + (["cut at the limit"] if answer.get("finished") is False else []))


def sample_groups(run: Run) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """[(heading, [(prompt, response, details)])] of a run's first and last logged samples."""
    steps = [sample["step"] for sample in run.samples if is_number(sample.get("step"))]
    groups = []
    for step in dict.fromkeys([min(steps), max(steps)] if steps else []):
        found = [sample for sample in run.samples if sample.get("step") == step][:SAMPLES_SHOWN]
        rows = [(str(s.get("prompt", "")), str(s.get("response", "")), _details(s)) for s in found]
        groups.append((f"Step {step}", rows))
    return groups


def latest_values(run: Run) -> list[tuple[str, str]]:
    """Every metric with its last value."""
    return [(name, number(value)) for name in run.names() if (value := run.last(name)) is not None]


def timing_rows(material: Material) -> list[Timing]:
    longest = max(material.timings.values(), default=0.0)
    return [
        Timing(label(stage), duration(seconds), 100 * seconds / longest if longest else 0.0)
        for stage, seconds in material.timings.items()
    ]


def duration(seconds: float) -> str:
    """Seconds for people: 4.2 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
