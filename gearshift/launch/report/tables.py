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
SAMPLES_SHOWN = 8  # of each step
SAMPLE_STEPS = 5  # the first and the last logged one, and those between them at equal distances
COLUMNS = (  # key in systems.json, heading, decimals
    ("true_score", "True score", 3),
    ("score", "Reward score", 2),
    ("win_rate", "Wins", 3),
    ("true_win_rate", "Wins by true score", 3),
    ("kl", "KL, nats", 2),
    ("length", "Length, tokens", 1),
    ("eos_rate", "EOS rate", 3),
    ("pretraining_loss", "Text loss, nats a token", 3),
    ("distinct_1", "Distinct-1", 3),
    ("distinct_2", "Distinct-2", 3),
)
SHARES = ("win_rate", "true_win_rate", "eos_rate")  # shown in per cent


@dataclass(frozen=True)
class SystemRow:
    """One system: `cells` in the order of `system_columns`, each a figure and its interval ("" where there is none)."""

    name: str
    label: str
    colour: str
    cells: list[tuple[str, str]]


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
    return style.colour(name, material.uncoloured())


def system_columns(material: Material) -> list[tuple[str, str, int]]:
    """(key, heading, decimals) of the columns for which at least one system has a number."""
    return [column for column in COLUMNS if material.systems_with(column[0])]


def system_rows(material: Material) -> list[SystemRow]:
    columns = system_columns(material)
    return [
        SystemRow(
            name,
            label(name),
            colour(material, name),
            [figure(material, name, key, digits) for key, _, digits in columns],
        )
        for name in material.systems
    ]


def figure(material: Material, name: str, key: str, decimals: int = 3) -> tuple[str, str]:
    """A system's figure and its interval, as text: shares in per cent."""
    percent = key in SHARES or (key == "true_score" and is_share(material))

    def show(value: float) -> str:
        return f"{value:.1%}" if percent else f"{round(value, decimals) + 0.0:.{decimals}f}"  # no "-0.00"

    value, ends = material.system_value(name, key), material.interval(name, key)
    if value is None:
        return NONE, ""
    return show(value), "" if ends is None or ends[0] == ends[1] else f"{show(ends[0])} to {show(ends[1])}"


def against(material: Material) -> str:
    """The label of the system that the others' answers are held against, "" if there is none."""
    names = [str(figures["against"]) for figures in material.systems.values() if figures.get("against")]
    return label(names[0]) if names else ""


def prefix_rows(material: Material) -> list[tuple[str, str, str, bool]]:
    """(system, prefix, score with its interval, whether it was chosen) of every candidate for a few-shot prefix."""
    rows = []
    for name, figures in material.systems.items():
        for one in figures.get("prefixes") or []:
            low, high = number(one.get("score_low")), number(one.get("score_high"))
            rows.append(
                (label(name), str(one["prefix"]), f"{number(one['score'])} ({low} to {high})", bool(one["chosen"]))
            )
    return rows


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
        parts = [f"{label(name)} {figure(material, name, 'true_score')[0]}" for name in scored]
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
        f"{name}\N{NO-BREAK SPACE}{round(answer[key], 2) + 0.0:.2f}"
        for key, name in (("score", "score"), ("kl", "KL"))
        if is_number(answer.get(key))
    ]
    return " · ".join(parts + (["cut at the limit"] if answer.get("finished") is False else []))


def sample_groups(run: Run) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """[(heading, [(prompt, response, details)])] of a run's samples over time: up to `SAMPLE_STEPS` logged steps."""
    steps = sorted({sample["step"] for sample in run.samples if is_number(sample.get("step"))})
    last = len(steps) - 1
    shown = sorted({round(last * i / (SAMPLE_STEPS - 1)) for i in range(SAMPLE_STEPS)}) if steps else []
    groups = []
    for step in (steps[place] for place in shown):
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
