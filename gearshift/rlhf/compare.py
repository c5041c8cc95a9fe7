"""Systems side by side: the same prompts, one answer each, scored alike (InstructGPT 4.1)."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from gearshift.engine import CausalModel, HybridEngine, RewardModel, Rollouts, World, init_distributed
from gearshift.engine.exchange import gather_rows
from gearshift.errors import UserError
from gearshift.rlhf.data.batches import collate_prompts, collate_text
from gearshift.rlhf.data.encoding import Encoder, PromptRow
from gearshift.rlhf.language import language_loss
from gearshift.rlhf.reporting import Report
from gearshift.rlhf.settings import CompareConfig, SystemSettings
from gearshift.rlhf.setup import (
    at_least,
    dtype_of,
    encoder_of,
    load_rows,
    require_same_tokens,
    sampling_of,
    text_blocks,
    tokenizer_of,
)
from gearshift.rlhf.supervised import evaluate

Checker = Callable[[dict[str, Any], str], float]


@dataclass(frozen=True)
class _Scored(Rollouts):
    """Rollouts with a score and a KL to the reference each, `[B]` fp32."""

    scores: Tensor
    kl: Tensor


def compare(config: CompareConfig, report: Report) -> None:
    """Answers, scores, KL to the reference, loss on text and (with a checker) the true score of each system.

    Every system answers the same prompts; a system's prefix is seen by that system alone, not by its judges.
    Writes `systems.json` and `answers.jsonl` in the run folder.
    """
    world = init_distributed()
    checker = load_checker(config.compare.true_score)
    first, system = next(iter(config.systems.items()))
    tokenizer = tokenizer_of(config.data, system.init, f"systems.{first}.init")
    named = {"reward.init": config.reward.init, "reference.init": config.reference.init}
    named |= {f"systems.{name}.init": system.init for name, system in config.systems.items()}
    for field, init in named.items():
        require_same_tokens(tokenizer, init, field)
    encoder = encoder_of(config.data, tokenizer)
    prompts = load_rows("data.validation", config.data.validation, encoder.prompts, report, config.compare.prompts)
    at_least(prompts, world.size, "data.validation")
    judges = _Judges(config, world)
    every: list[dict[str, Any]] = []
    systems: dict[str, dict[str, float]] = {}
    report.start([], len(config.systems))
    for number, (name, system) in enumerate(config.systems.items(), 1):
        answers, text_loss = _answer(config, world, system, prompts, encoder, judges, report)
        rows = [{"system": name, **_judged(a, prompts[a["id"]], checker)} for a in answers]
        every += rows
        systems[name] = summary(rows, text_loss)
        shown = ", ".join(f"{key} {value:.3f}" for key, value in systems[name].items())
        report.say(f"{name:<12} {shown}")
        report.log(number, {f"{name}/{key}": value for key, value in systems[name].items()})
    if world.is_main:
        folder = Path(config.run.folder)
        (folder / "systems.json").write_text(json.dumps(systems, indent=1), encoding="utf-8")
        with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in every)


def _judged(answer: dict[str, Any], prompt: PromptRow, checker: Checker | None) -> dict[str, Any]:
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


def summary(answers: list[dict[str, Any]], text_loss: float | None) -> dict[str, float]:
    """Means over the answers; `true_score_ci95` is the half width of the 95% interval of the mean, 1.96·s/√n."""
    found = {key: _mean([a[key] for a in answers]) for key in ("score", "kl", "length", "finished")}
    if text_loss is not None:
        found["pretraining_loss"] = text_loss
    if "true_score" in answers[0]:
        true = [a["true_score"] for a in answers]
        mean = _mean(true)
        spread = math.sqrt(sum((t - mean) ** 2 for t in true) / max(1, len(true) - 1))
        found |= {"true_score": mean, "true_score_ci95": 1.96 * spread / math.sqrt(len(true))}
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


class _Judges:
    """What all systems are held against: the reward model and the reference, frozen; and held-out text."""

    def __init__(self, config: CompareConfig, world: World):
        common: dict[str, Any] = {
            "dtype": dtype_of(config.run, world),
            "micro_batch_size": config.compare.micro_batch_size,
            "deepspeed_extra": config.deepspeed,
        }
        self.reward_model = RewardModel.load(config.reward.init, world, **common)
        self.reference = CausalModel.load(config.reference.init, world, **common)


def _answer(
    config: CompareConfig,
    world: World,
    system: SystemSettings,
    prompts: list[PromptRow],
    encoder: Encoder,
    judges: _Judges,
    report: Report,
) -> tuple[list[dict[str, Any]], float | None]:
    """One system's answers (the same list on every rank), and its loss on held-out text. Collective."""
    policy = HybridEngine.load(
        system.init,
        world,
        dtype=dtype_of(config.run, world),
        micro_batch_size=config.compare.micro_batch_size,
        tp_size=config.rollout.tp_size,
        slots=config.rollout.slots,
        bucket_bytes=config.rollout.bucket_mb << 20,
        keep_weights=config.rollout.keep_weights,
        deepspeed_extra=config.deepspeed,
    )
    sampling = sampling_of(config.rollout, encoder.tokenizer, policy.module, config.run.seed)
    mine = prompts[world.share(len(prompts))]
    with policy.rollout() as generator:
        seen = [encoder.with_prefix(prompt, system.prefix) for prompt in mine]
        rollouts = generator.generate(collate_prompts(seen), sampling)
    plain = collate_prompts(mine).to(world.device)
    rollouts = dataclasses.replace(rollouts, tokens=plain.tokens, lengths=plain.lengths)
    scores = judges.reward_model.score(rollouts)
    ref_logprobs = judges.reference.logprobs(rollouts, sampling.temperature)
    kl = ((rollouts.logprobs - ref_logprobs) * rollouts.mask).sum(1)
    answers = _rows(rollouts, scores, kl, encoder, world)
    text_loss = _text_loss(config, policy, encoder, report)
    del policy
    gc.collect()
    return answers, text_loss


def _text_loss(config: CompareConfig, policy: CausalModel, encoder: Encoder, report: Report) -> float | None:
    text_encoder = encoder_of(config.data, encoder.tokenizer, config.ptx.max_tokens)
    blocks = text_blocks("ptx.validation", config.ptx.validation, text_encoder, report)
    return float(evaluate(policy, language_loss, blocks, collate_text)["loss"]) if blocks else None


def _rows(rollouts: Rollouts, scores: Tensor, kl: Tensor, encoder: Encoder, world: World) -> list[dict[str, Any]]:
    """All ranks' answers as plain rows; `id` is the prompt's place in the kept rows. Collective."""
    fields = {f.name: getattr(rollouts, f.name) for f in dataclasses.fields(rollouts)}
    every, _ = gather_rows(_Scored(**fields, scores=scores, kl=kl), dist.group.WORLD if world.size > 1 else None)
    return [
        {
            "id": int(every.ids[b]),
            "response": encoder.tokenizer.decode(every.responses[b][every.mask[b]].tolist(), skip_special_tokens=True),
            "score": float(every.scores[b]),
            "kl": float(every.kl[b]),
            "length": int(every.mask[b].sum()),
            "finished": bool(every.finished[b]),
        }
        for b in range(len(every))
    ]
