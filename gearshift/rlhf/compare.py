"""Systems side by side: the same prompts, one answer each, scored alike (InstructGPT 4.1)."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gearshift.engine import init_distributed
from gearshift.errors import UserError
from gearshift.rlhf.data.encoding import Encoder, PromptRow
from gearshift.rlhf.reporting import Report
from gearshift.rlhf.settings import CompareConfig
from gearshift.rlhf.setup import at_least, encoder_of, load_rows, require_same_tokens, tokenizer_of
from gearshift.rlhf.standings import markdown, summary, win_rates
from gearshift.rlhf.systems import Answer, Examination

Checker = Callable[[dict[str, Any], str], float]


def compare(config: CompareConfig, report: Report) -> None:
    """Answers, scores, KL to the reference, loss on text and (with a checker) the true score of each system.

    Every system answers the same prompts with the same seeds. Writes `systems.json`, `systems.md` and `answers.jsonl`
    in the run folder.
    """
    world = init_distributed()
    checker, settings, seed = load_checker(config.compare.true_score), config.compare, config.run.seed
    encoder = _encoder(config)
    prompts = load_rows("data.validation", config.data.validation, encoder.prompts, report, settings.prompts)
    selection = load_rows("compare.selection", settings.selection, encoder.prompts, report, settings.selection_prompts)
    at_least(prompts, world.size, "data.validation")
    if settings.selection:
        at_least(selection, world.size, "compare.selection")
    examination = Examination(config, world, encoder, prompts, selection, report)
    answers: dict[str, list[Answer]] = {}
    systems: dict[str, dict[str, Any]] = {}
    report.start([], len(config.systems))
    for number, (name, system) in enumerate(config.systems.items(), 1):
        examined = examination.examine(system)
        answers[name] = [{"system": name, **_judged(a, prompts[a["id"]], checker)} for a in examined.answers]
        figures = summary(answers[name], examined.text_loss, settings.resamples, seed)
        means = {key: value for key, value in figures.items() if not key.endswith(("_low", "_high"))}
        report.say(f"{name:<12} " + ", ".join(f"{key} {value:.3f}" for key, value in means.items()))
        report.log(number, {f"{name}/{key}": value for key, value in figures.items()})
        systems[name] = {**figures, "prefixes": examined.prefixes} if examined.prefixes else dict(figures)
    if settings.against is not None:
        for name in systems:
            systems[name] |= win_rates(answers[name], answers[settings.against], settings.resamples, seed)
            systems[name]["against"] = settings.against
    if world.is_main:
        _write(Path(config.run.folder), systems, answers, settings.against)


def _encoder(config: CompareConfig) -> Encoder:
    """The encoder that all models share. Raises SettingError for a model that reads other tokens."""
    first, system = next(iter(config.systems.items()))
    tokenizer = tokenizer_of(config.data, system.init, f"systems.{first}.init")
    named = {"reference.init": config.reference.init}
    named |= {f"systems.{name}.init": system.init for name, system in config.systems.items()}
    for field, init in named.items():
        require_same_tokens(tokenizer, init, field)
    return encoder_of(config.data, tokenizer)


def _write(
    folder: Path, systems: dict[str, dict[str, Any]], answers: dict[str, list[Answer]], against: str | None
) -> None:
    with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for rows in answers.values() for row in rows)
    (folder / "systems.md").write_text(markdown(systems, against), encoding="utf-8")
    (folder / "systems.json").write_text(json.dumps(systems, indent=1), encoding="utf-8")


def _judged(answer: Answer, prompt: PromptRow, checker: Checker | None) -> Answer:
    """The answer with its prompt's text and kind, and its true score."""
    answer = {"prompt": prompt.text, **answer}
    if "kind" in prompt.extra:
        answer["kind"] = prompt.extra["kind"]
    if checker is not None:
        try:
            answer["true_score"] = float(checker(prompt.extra, answer["response"]))
        except KeyError as error:
            there = ", ".join(prompt.extra)
            raise UserError(
                f"{prompt.origin}: compare.true_score needs the field {error}; the row has {there}"
            ) from error
    return answer


def load_checker(name: str | None) -> Checker | None:
    """The function that "module:function" names. Raises UserError when it is not there."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        checker: Checker = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"compare.true_score: {name}: {error}; write it as module:function") from error
    if not callable(checker):
        raise UserError(f"compare.true_score: {name} is a {type(checker).__name__}, not a function of (row, response)")
    return checker
