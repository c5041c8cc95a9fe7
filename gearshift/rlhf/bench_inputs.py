"""What `gearshift bench` measures on, where its config leaves it out: random models, random prompts."""

from __future__ import annotations

import copy
import random
from typing import Any

from gearshift.engine import RewardModel, Training, World
from gearshift.engine.heads import bind_value_head
from gearshift.engine.loading import load_module
from gearshift.rlhf.data.encoding import PromptRow
from gearshift.rlhf.data.sampling import Sampler
from gearshift.rlhf.data.tokenizers import SMALLEST_VOCABULARY, train_tokenizer
from gearshift.rlhf.new_model import new_model_config
from gearshift.rlhf.ppo_data import PpoData, pretraining_batches, prompt_batches
from gearshift.rlhf.ppo_models import (
    Models,
    common_of,
    critic_training,
    load_models,
    load_policy,
    load_reference,
)
from gearshift.rlhf.reporting import Report
from gearshift.rlhf.rewards import Asked
from gearshift.rlhf.settings import BenchConfig
from gearshift.rlhf.setup import encoder_of, frozen, offloaded, tokenizer_of


def load_inputs(config: BenchConfig, world: World, report: Report) -> tuple[Models, PpoData]:
    """Models and data of a config that `gearshift ppo` could run, and what stands in for either. Collective."""
    data = _random_data(config, world, report) if not config.data.train else PpoData.load(config, world, report)
    if not config.all_of_one_shape:
        return load_models(config, world, data), data
    return _alike(config, world, shape_of(config, data.tokenizer)), data


def shape_of(config: BenchConfig, tokenizer: Any) -> Any:
    """The `transformers` config of random models; None where the policy is read from a folder."""
    return new_model_config(config.policy.config or {}, tokenizer) if config.policy.init == "config" else None


def _alike(config: BenchConfig, world: World, shape: Any) -> Models:
    """Critic and reward model are the policy with a value head in place of its own."""
    common = common_of(config, world)
    policy = load_policy(config, world, common, copy.deepcopy(shape))

    def with_value_head(common: dict[str, Any], training: Training | None = None) -> RewardModel:
        if shape is None:
            return RewardModel.load(config.policy.init, world, training=training, new_head=True, **common)
        return _random_value_model(shape, world, training, **common)

    return Models(
        policy,
        with_value_head(common, critic_training(config)) if config.has_critic else None,
        load_reference(config, world, policy, frozen(common), copy.deepcopy(shape)),
        with_value_head(offloaded(frozen(common), config.reward.offload)),
    )


def _random_value_model(shape: Any, world: World, training: Training | None, **common: Any) -> RewardModel:
    from transformers import AutoModelForSequenceClassification

    dtype, extra = common.pop("dtype"), common["deepspeed_extra"]
    shape = copy.deepcopy(shape)
    shape.num_labels = 1
    module = load_module(
        AutoModelForSequenceClassification, "config", world, dtype, config=shape, deepspeed_extra=extra
    )
    bind_value_head(module)
    return RewardModel(module, world, training=training, **common)


def _random_data(config: BenchConfig, world: World, report: Report) -> PpoData:
    """Prompts of `data.max_prompt_tokens` random tokens each; pretraining text where the config names some."""
    random_model = config.policy.init == "config"
    # Of a random model every byte is a token: its ids beyond these stand for no text.
    tokenizer = (
        train_tokenizer(["a"], SMALLEST_VOCABULARY) if random_model else tokenizer_of(config.data, config.policy.init)
    )
    size = shape_of(config, tokenizer).vocab_size if random_model else len(tokenizer)
    count = config.ppo.prompts * (config.bench.warmup + config.bench.iterations)
    rows = random_prompts(
        count, config.data.max_prompt_tokens, size, tokenizer, config.data.prompt_key, config.run.seed
    )
    cursors = {"prompts": Sampler(len(rows), config.ppo.prompts, config.run.seed)}
    text_encoder = encoder_of(config.data, tokenizer, config.ptx.max_tokens)
    return PpoData(
        prompts=prompt_batches(rows, cursors["prompts"], world, config.ppo.answers),
        pretraining=pretraining_batches(config, text_encoder, world, cursors, report),
        held_out_prompts=[],
        asked=Asked(tokenizer, config.data.keys, rows),
        held_out_text=[],
        tokenizer=tokenizer,
        cursors=cursors,
    )


def random_prompts(count: int, length: int, vocabulary: int, tokenizer: Any, key: str, seed: int) -> list[PromptRow]:
    """`count` prompts of `length` tokens below `vocabulary`, none of them special; the same on every rank.

    `key`: the field of a row that holds its prompt.
    """
    special = set(tokenizer.all_special_ids)
    plain = [token for token in range(vocabulary) if token not in special]
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        tokens = draw.choices(plain, k=length)
        text = tokenizer.decode(tokens)
        rows.append(PromptRow(number, tokens, text, {key: text}, f"random prompt {number}"))
    return rows
