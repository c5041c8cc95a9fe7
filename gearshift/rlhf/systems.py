"""One system of a comparison: its answers, held against the same judges as all others', and its few-shot prefix."""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from gearshift.engine import CausalModel, HybridEngine, Rollouts, World
from gearshift.engine.exchange import gather_rows
from gearshift.engine.settings import RolloutSettings
from gearshift.rlhf.compare_settings import SystemSettings
from gearshift.rlhf.data.batches import collate_prompts, collate_text
from gearshift.rlhf.data.encoding import Block, Encoder, PromptRow
from gearshift.rlhf.language import language_loss
from gearshift.rlhf.reporting import Report
from gearshift.rlhf.rewards import Asked, load_reward
from gearshift.rlhf.settings import CompareConfig
from gearshift.rlhf.setup import dtype_of, encoder_of, offloaded, rollout_of, sampling_of, text_blocks
from gearshift.rlhf.statistics import bootstrap_mean
from gearshift.rlhf.supervised import evaluate

Answer = dict[str, Any]  # id, response, score, kl, length, finished


@dataclass(frozen=True)
class _Scored(Rollouts):
    """Rollouts with a score and a KL to the reference each, `[B]` fp32."""

    scores: Tensor
    kl: Tensor


@dataclass(frozen=True)
class Examined:
    """What one system did: answers in the order of the prompts, its loss on held-out text (None where there is none),
    and with candidates for its prefix one figure each: `prefix`, `score` with its interval, `chosen`."""

    answers: list[Answer]
    text_loss: float | None
    prefixes: list[dict[str, Any]]


class Examination:
    """What all systems are held against: the prompts, the reward and the reference, frozen, held-out text."""

    def __init__(
        self,
        config: CompareConfig,
        world: World,
        encoder: Encoder,
        prompts: list[PromptRow],
        selection: list[PromptRow],
        report: Report,
    ):
        self._config, self._world, self._encoder = config, world, encoder
        self._prompts, self._selection = prompts, selection
        common: dict[str, Any] = {
            "dtype": dtype_of(config.run, world),
            "micro_batch_size": config.compare.micro_batch_size,
            "micro_batch_tokens": config.compare.micro_batch_tokens,
            "deepspeed_extra": config.deepspeed,
        }
        asked = Asked(encoder.tokenizer, config.data.keys, prompts, selection)
        self._reward = load_reward(config.reward, asked, world, **common)
        reference = config.reference
        self._reference = CausalModel.load(reference.init, world, **offloaded(common, reference.offload))
        text = encoder_of(config.data, encoder.tokenizer, config.ptx.max_tokens)
        self._text: list[Block] = text_blocks("ptx.validation", config.ptx.validation, text, report)

    def examine(self, system: SystemSettings) -> Examined:
        """Collective. Every rank gets the same."""
        rollout = system.rollout(self._config.rollout)
        policy = self._load(system.init)
        candidates = [self._candidate(policy, rollout, prefix) for prefix in system.prefixes]
        prefix = system.prefix
        if candidates:
            best = max(candidates, key=lambda candidate: float(candidate["score"]))  # of equals the first
            prefix = best["prefix"]
            candidates = [{**candidate, "chosen": candidate is best} for candidate in candidates]
        answers = self._answers(policy, rollout, prefix, self._prompts)
        loss = float(evaluate(policy, language_loss, self._text, collate_text)["loss"]) if self._text else None
        del policy
        gc.collect()
        return Examined(answers, loss, candidates)

    def _load(self, init: str) -> HybridEngine:
        return HybridEngine.load(
            init,
            self._world,
            dtype=dtype_of(self._config.run, self._world),
            micro_batch_size=self._config.compare.micro_batch_size,
            micro_batch_tokens=self._config.compare.micro_batch_tokens,
            deepspeed_extra=self._config.deepspeed,
            **rollout_of(self._config.rollout),
        )

    def _candidate(self, policy: HybridEngine, rollout: RolloutSettings, prefix: str) -> dict[str, Any]:
        """A prefix, and the mean score of the answers that it brings on the selection prompts, with its interval."""
        scores = [answer["score"] for answer in self._answers(policy, rollout, prefix, self._selection)]
        found = bootstrap_mean(scores, self._config.compare.resamples, self._config.run.seed)
        return {"prefix": prefix, **found.fields("score")}

    def _answers(
        self, policy: HybridEngine, rollout: RolloutSettings, prefix: str, prompts: list[PromptRow]
    ) -> list[Answer]:
        """One answer to each prompt. The prefix is seen by the writer alone, not by its judges."""
        sampling = sampling_of(rollout, self._encoder.tokenizer, policy.module, self._config.run.seed)
        mine = prompts[self._world.share(len(prompts))]
        with policy.rollout() as generator:
            seen = [self._encoder.with_prefix(prompt, prefix) for prompt in mine]
            rollouts = generator.generate(collate_prompts(seen), sampling)
        plain = collate_prompts(mine).to(self._world.device)
        rollouts = dataclasses.replace(rollouts, tokens=plain.tokens, lengths=plain.lengths)
        scores = self._reward.score(rollouts)
        # One reference for all systems, whatever the temperature that each of them writes at.
        ref_logprobs = self._reference.logprobs(rollouts, self._config.rollout.temperature)
        kl = ((rollouts.logprobs - ref_logprobs) * rollouts.mask).sum(1)
        return self._gathered(rollouts, scores, kl)

    def _gathered(self, rollouts: Rollouts, scores: Tensor, kl: Tensor) -> list[Answer]:
        """All ranks' answers as plain rows; `id` is the prompt's place in the kept rows. Collective."""
        fields = {f.name: getattr(rollouts, f.name) for f in dataclasses.fields(rollouts)}
        group = dist.group.WORLD if self._world.size > 1 else None
        every, _ = gather_rows(_Scored(**fields, scores=scores, kl=kl), group)
        decode = self._encoder.tokenizer.decode
        return [
            {
                "id": int(every.ids[b]),
                "response": decode(every.responses[b][every.mask[b]].tolist(), skip_special_tokens=True),
                "score": float(every.scores[b]),
                "kl": float(every.kl[b]),
                "length": int(every.mask[b].sum()),
                "finished": bool(every.finished[b]),
            }
            for b in range(len(every))
        ]
