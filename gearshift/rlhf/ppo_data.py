"""What a PPO run reads: prompts, pretraining text, and what is held out of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gearshift.engine import (
    Prompts,
    TokenBatch,
    World,
)
from gearshift.rlhf.data.batches import collate_prompts
from gearshift.rlhf.data.encoding import Encoder, PromptRow
from gearshift.rlhf.data.sampling import Sampler, rank_part
from gearshift.rlhf.language import text_batches
from gearshift.rlhf.reporting import Report
from gearshift.rlhf.rewards import Asked
from gearshift.rlhf.settings import PpoConfig
from gearshift.rlhf.setup import (
    at_least,
    encoder_of,
    load_rows,
    require_critic_start,
    require_same_tokens,
    text_blocks,
    tokenizer_of,
)


@dataclass
class PpoData:
    """This rank's prompts and pretraining text, without end; and what is held out."""

    prompts: Iterator[Prompts]
    pretraining: Iterator[TokenBatch]
    held_out_prompts: list[PromptRow]
    asked: Asked  # all prompts, for what scores the answers to them
    held_out_text: list[Any]
    tokenizer: Any
    cursors: dict[str, Sampler] = field(default_factory=dict)  # where prompts and pretraining text are drawn from

    def decode(self, tokens: Tensor) -> str:
        text: str = self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        return text

    @classmethod
    def load(cls, config: PpoConfig, world: World, report: Report) -> PpoData:
        tokenizer = tokenizer_of(config.data, config.policy.init)
        if config.critic_is_reward:
            require_critic_start(tokenizer, config.reward.init)
        elif config.has_critic:
            require_same_tokens(tokenizer, config.critic.init, "critic.init")
        if config.reference.init != "policy":
            require_same_tokens(tokenizer, config.reference.init, "reference.init")
        encoder = encoder_of(config.data, tokenizer)
        rows = load_rows("data.train", config.data.train, encoder.prompts, report)
        held_out = load_rows("data.validation", config.data.validation, encoder.prompts, report)
        text_encoder = encoder_of(config.data, tokenizer, config.ptx.max_tokens)
        cursors = {"prompts": Sampler(len(rows), config.ppo.prompts, config.run.seed)}
        return cls(
            prompts=prompt_batches(rows, cursors["prompts"], world, config.ppo.answers),
            pretraining=pretraining_batches(config, text_encoder, world, cursors, report),
            held_out_prompts=held_out,
            asked=Asked(tokenizer, config.data.keys, rows, held_out),
            held_out_text=text_blocks("ptx.validation", config.ptx.validation, text_encoder, report),
            tokenizer=tokenizer,
            cursors=cursors,
        )


def prompt_batches(rows: list[PromptRow], sampler: Sampler, world: World, answers: int = 1) -> Iterator[Prompts]:
    """This rank's part of every global batch: each prompt that is drawn, `answers` times."""
    for draw in sampler:
        numbers = zip(draw.rows, draw.draws, strict=True)
        every = [(rows[i], number, answer) for i, number in numbers for answer in range(answers)]
        mine = rank_part(every, world.rank, world.size)
        yield collate_prompts([row for row, _, _ in mine], [n for _, n, _ in mine], [a for _, _, a in mine])


def pretraining_batches(
    config: PpoConfig, encoder: Encoder, world: World, cursors: dict[str, Sampler], report: Report
) -> Iterator[TokenBatch]:
    """Text for each policy step: `examples_per_episode` sequences per episode of a minibatch; adds its cursor."""
    if config.ptx.weight == 0:
        return iter(())
    blocks = text_blocks("ptx.data", config.ptx.data, encoder, report)
    at_least(blocks, 1, "ptx.data")
    per_step = config.ppo.minibatch_size * config.ptx.examples_per_episode
    cursors["pretraining"] = Sampler(len(blocks), per_step, config.run.seed + 1)
    return text_batches(blocks, cursors["pretraining"], world)
