"""What a report is made from: the files of one run, of a comparison, or of a folder of stages.

Nothing here draws. A file that is absent reads as empty, so that its figure can say that it is missing; a file that is
there and cannot be read is a UserError naming the file and the line.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from gearshift.errors import UserError

LABELS = {"pretrain": "Base model", "base": "Base", "prompted": "Prompted", "flan": "FLAN", "t0": "T0", "sft": "SFT"}
LABELS |= {"reward": "Reward model", "ppo": "PPO", "ppo-ptx": "PPO-ptx", "grpo": "GRPO", "rloo": "RLOO"}
POLICIES = ("ppo", "ppo-ptx", "grpo", "rloo")
STAGES = ("pretrain", "sft", "flan", "t0", "reward", *POLICIES)
SYSTEM_ORDER = ("base", "prompted", "flan", "t0", "sft", *POLICIES)


@dataclass(frozen=True)
class Series:
    """One metric of one run: `values[i]` was logged at `steps[i]`; steps rise, every value is finite."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Run:
    """One run folder, read."""

    name: str
    config: str = ""  # config.yaml, verbatim
    metrics: tuple[dict[str, Any], ...] = ()  # lines of metrics.jsonl
    samples: tuple[dict[str, Any], ...] = ()  # lines of samples.jsonl

    @property
    def label(self) -> str:
        return label(self.name)

    def names(self) -> list[str]:
        """Every metric that was logged, in the order in which they first appear."""
        return [name for name in dict.fromkeys(key for line in self.metrics for key in line) if name != "step"]

    def series(self, metric: str) -> Series | None:
        """The finite values of a metric, or None if it has none. Of two lines of one step the later counts: a run
        that was resumed logs the steps after its checkpoint again."""
        points = {int(line["step"]): line[metric] for line in self.metrics if is_number(line.get(metric))}
        steps = tuple(sorted(points))
        return Series(steps, tuple(float(points[step]) for step in steps)) if steps else None

    def last(self, metric: str) -> float | None:
        """The metric's latest finite value."""
        series = self.series(metric)
        return series.values[-1] if series else None


@dataclass(frozen=True)
class Material:
    """Everything that one page shows. Fields stay empty where the folder has no such file."""

    folder: Path
    kind: str  # "run", "compare" or "stages"
    title: str
    runs: dict[str, Run] = field(default_factory=dict)
    systems: dict[str, dict[str, Any]] = field(default_factory=dict)  # in the order in which they are shown
    answers: tuple[dict[str, Any], ...] = ()
    checks: tuple[dict[str, Any], ...] = ()
    timings: dict[str, float] = field(default_factory=dict)  # stage -> seconds
    about: dict[str, Any] = field(default_factory=dict)

    def policies(self) -> list[Run]:
        """The PPO runs. A single run counts as one, whatever its folder is called, if it logged an objective."""
        if self.kind == "run":
            return [run for run in self.runs.values() if any(name.startswith("objective/") for name in run.names())]
        return [self.runs[name] for name in POLICIES if name in self.runs]

    def stages(self) -> list[Run]:
        """The runs that are trained on given data: base model, SFT, reward model."""
        policies = self.policies()
        return [run for run in self.runs.values() if run not in policies]

    def system_value(self, system: str, key: str) -> float | None:
        value = self.systems.get(system, {}).get(key)
        return float(value) if is_number(value) else None

    def uncoloured(self) -> list[str]:
        """The systems that have no colour of their own, in order."""
        return [name for name in self.systems if name not in SYSTEM_ORDER]

    def interval(self, system: str, key: str) -> tuple[float, float] | None:
        """The ends of the interval of a figure, if it has one."""
        low, high = self.system_value(system, f"{key}_low"), self.system_value(system, f"{key}_high")
        return None if low is None or high is None else (low, high)

    def systems_with(self, key: str) -> list[str]:
        """The systems that have a number under `key`."""
        return [name for name in self.systems if self.system_value(name, key) is not None]


def label(name: str) -> str:
    """How a run or system is written for people."""
    return LABELS.get(name, name)


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_run(folder: Path) -> Material:
    """One run folder."""
    run = _run(folder)
    return Material(folder, "run", f"Run {run.name}", runs={run.name: run})


def read_compare(folder: Path) -> Material:
    """One folder of `gearshift compare`."""
    return Material(
        folder, "compare", f"Comparison {folder.resolve().name}", systems=_systems(folder), answers=_answers(folder)
    )


def read_stages(folder: Path) -> Material:
    """A folder of stages, such as the demo's; stages that are not there are left out."""
    compare = folder / "compare"
    return Material(
        folder,
        "stages",
        "From base model to PPO-ptx",
        runs={name: _run(folder / name) for name in STAGES if (folder / name).is_dir()},
        systems=_systems(compare),
        answers=_answers(compare),
        checks=_checks(folder / "checks.json"),
        timings={str(k): float(v) for k, v in _typed(folder / "timings.json", dict).items() if is_number(v)},
        about=_typed(folder / "world" / "about.json", dict),
    )


def _run(folder: Path) -> Run:
    config = folder / "config.yaml"
    metrics = _lines(folder / "metrics.jsonl")
    for number, line in enumerate(metrics, start=1):
        if not is_number(line.get("step")):
            raise UserError(f"{folder / 'metrics.jsonl'}, line {number}: no number under 'step'")
    return Run(
        name=folder.resolve().name,
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        metrics=tuple(metrics),
        samples=tuple(_lines(folder / "samples.jsonl")),
    )


def _systems(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "systems.json"
    systems = _typed(path, dict)
    for name, values in systems.items():
        if not isinstance(values, dict):
            raise UserError(f"{path}: system '{name}' is not an object of numbers")
    known = [name for name in SYSTEM_ORDER if name in systems]
    return {name: systems[name] for name in known + [name for name in systems if name not in known]}


def _answers(folder: Path) -> tuple[dict[str, Any], ...]:
    path = folder / "answers.jsonl"
    answers = _lines(path)
    for number, line in enumerate(answers, start=1):
        if missing := [key for key in ("system", "id", "prompt", "response") if key not in line]:
            raise UserError(f"{path}, line {number}: no field '{missing[0]}'")
    return tuple(answers)


def _checks(path: Path) -> tuple[dict[str, Any], ...]:
    checks = _typed(path, list)
    for number, check in enumerate(checks, start=1):
        if not (isinstance(check, dict) and "name" in check and isinstance(check.get("passed"), bool)):
            raise UserError(f"{path}, check {number}: expected an object with 'name' and 'passed' (true or false)")
    return tuple(checks)


def _typed(path: Path, kind: type) -> Any:
    """The content of a JSON file that must be a list or an object; an empty one if there is no file."""
    if not path.is_file():
        return kind()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, kind):
        raise UserError(f"{path}: expected a JSON {'list' if kind is list else 'object'}")
    return content


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, [] if there is no file. A last line without its newline is still being written by
    a run that is going on, so it is left out if it is not whole."""
    if not path.is_file():
        return []
    lines: Sequence[str] = path.read_text(encoding="utf-8").split("\n")
    objects = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object")
        objects.append(content)
    return objects
