"""Language modelling: pretraining a base model, SFT, and the pretraining loss of PPO-ptx. One loss, three uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from gearshift.engine import CausalModel, HybridEngine, TokenBatch, World, init_distributed
from gearshift.kernels import Loss
from gearshift.rlhf.best import Best
from gearshift.rlhf.data.batches import collate_text
from gearshift.rlhf.data.encoding import Encoder
from gearshift.rlhf.data.formats import read_document
from gearshift.rlhf.data.sampling import Sampler
from gearshift.rlhf.data.sources import read_sources
from gearshift.rlhf.data.tokenizers import train_tokenizer
from gearshift.rlhf.new_model import new_model_config
from gearshift.rlhf.reporting import Report
from gearshift.rlhf.resuming import Saver
from gearshift.rlhf.rewards import Asked, load_reward, mean_over_prompts
from gearshift.rlhf.settings import PretrainConfig, RewardSettings, SftConfig
from gearshift.rlhf.setup import (
    at_least,
    dtype_of,
    encoder_of,
    frozen,
    load_rows,
    rollout_of,
    sampling_of,
    save_policy,
    schedule_of,
    text_blocks,
    tokenizer_of,
    training_of,
)
from gearshift.rlhf.supervised import SCORE, evaluate, fit


def language_loss(model: CausalModel, batch: TokenBatch, count: Tensor) -> Loss:
    """−Σ log p(target) / count, over the positions that have a target; temperature 1."""
    lengths = batch.sizes
    width = int(lengths.max())
    logprobs, _ = model.forward(batch.tokens[:, :width], batch.targets[:, :width], lengths=lengths)
    return Loss(-logprobs.sum() / count, {"tokens": (batch.targets != -100).sum().double()})


def text_batches(rows: list[Any], sampler: Sampler, world: World) -> Iterator[TokenBatch]:
    """This rank's rows of every global batch that the sampler draws."""
    for draw in sampler:
        yield collate_text([rows[i] for i in draw.rows[world.rank :: world.size]])


def pretrain(config: PretrainConfig, report: Report) -> None:
    """A base model from text: from nothing with `policy.init: config`, else further training of a model."""
    world = init_distributed()
    tokenizer = _tokenizer(config)
    encoder = encoder_of(config.data, tokenizer)
    blocks = text_blocks("data.train", config.data.train, encoder, report)
    held_out = text_blocks("data.validation", config.data.validation, encoder, report)
    at_least(blocks, 1, "data.train")
    sampler = Sampler(len(blocks), config.train.batch_size, config.run.seed)
    steps = sampler.steps(config.train.epochs)
    model = CausalModel.load(config.policy.init, world, **_how(config, world, tokenizer, steps))
    saver = Saver(config, world, report, {"model": model}, {"rows": sampler}, tokenizer)
    report.start([f"model        {model.parameters_total:,} parameters"], steps, saver.done)
    batches = text_batches(blocks, sampler, world)
    validate = partial(held_out_loss, model, held_out)
    fit(model, language_loss, batches, steps, report, validate, config.train.validate_every, saver)
    save_policy(model, config.run.folder, config.policy, tokenizer)


def sft(config: SftConfig, report: Report) -> None:
    """Supervised fine-tuning: the loss is on the responses alone; part of each batch may be pretraining text.

    InstructGPT's SFT baseline and the start of its PPO (2 epochs, 10% pretraining text) are two configs of this.
    """
    world, train = init_distributed(), config.train
    tokenizer = tokenizer_of(config.data, config.policy.init)
    encoder = encoder_of(config.data, tokenizer)
    rows = load_rows("data.train", config.data.train, encoder.demonstrations, report)
    held_out = load_rows("data.validation", config.data.validation, encoder.demonstrations, report)
    batches, steps, cursors = _mixed_batches(config, rows, encoder, world, report)
    how = _how(config, world, tokenizer, steps) | {"residual_dropout": train.residual_dropout}
    model, judged = _judged(config, world, encoder, report, how)
    best = Best(
        config.run.folder,
        world,
        report,
        lambda folder: save_policy(model, folder, config.policy, tokenizer),
        resumes=config.checkpoint.resumes,
    )
    saver = Saver(config, world, report, {"model": model}, {**cursors, "best": best}, tokenizer)

    def validate() -> dict[str, float]:
        return held_out_loss(model, held_out) | judged()

    report.start([f"model        {model.parameters_total:,} parameters"], steps, saver.done)
    fit(model, language_loss, batches, steps, report, validate, train.validate_every, saver, best)
    if best.step is not None:
        report.say(f"best         the model of step {best.step}, in {best.folder}/model")
    save_policy(model, config.run.folder, config.policy, tokenizer)


def _judged(
    config: SftConfig, world: World, encoder: Encoder, report: Report, how: dict[str, Any]
) -> tuple[CausalModel, Callable[[], dict[str, float]]]:
    """The model, and with `train.best: score` what scores its answers to the held-out prompts (else nothing)."""
    if config.train.best == "loss":
        return CausalModel.load(config.policy.init, world, **how), dict
    policy = HybridEngine.load(config.policy.init, world, **how, **rollout_of(config.rollout))
    prompts = load_rows("data.validation", config.data.validation, encoder.prompts, report)
    assert config.reward.init is not None  # checked before launch
    settings = RewardSettings(**config.reward.model_dump())
    common = {name: how[name] for name in ("dtype", "micro_batch_size", "micro_batch_tokens", "deepspeed_extra")}
    reward = load_reward(settings, Asked(encoder.tokenizer, config.data.keys, prompts), world, **frozen(common))
    sampling = sampling_of(config.rollout, encoder.tokenizer, policy.module, config.run.seed)
    return policy, lambda: {SCORE: mean_over_prompts(policy, prompts, sampling, world, reward.score)[0]}


def held_out_loss(model: CausalModel, rows: list[Any]) -> dict[str, float]:
    """The loss on held-out rows; nothing without any. Collective."""
    return {"loss/validation": float(evaluate(model, language_loss, rows, collate_text)["loss"])} if rows else {}


def _mixed_batches(
    config: SftConfig, rows: list[Any], encoder: Encoder, world: World, report: Report
) -> tuple[Iterator[TokenBatch], int, dict[str, Sampler]]:
    """Batches of demonstrations and `train.pretraining_fraction` of text, how many steps make the epochs, cursors."""
    train, seed = config.train, config.run.seed
    texts = round(train.batch_size * train.pretraining_fraction)
    demonstrations = Sampler(len(rows), train.batch_size - texts, seed)
    steps = demonstrations.steps(train.epochs)
    if not texts:
        return text_batches(rows, demonstrations, world), steps, {"rows": demonstrations}
    blocks = text_blocks("train.pretraining", train.pretraining, encoder, report)
    at_least(blocks, 1, "train.pretraining")
    pretraining = Sampler(len(blocks), texts, seed)

    def batches() -> Iterator[TokenBatch]:
        for draw, text in zip(demonstrations, pretraining, strict=False):
            both = [rows[i] for i in draw.rows] + [blocks[i] for i in text.rows]
            yield collate_text(both[world.rank :: world.size])

    return batches(), steps, {"rows": demonstrations, "pretraining": pretraining}


def _how(config: PretrainConfig | SftConfig, world: World, tokenizer: Any, steps: int) -> dict[str, Any]:
    """What the model that trains is loaded with."""
    new = config.policy.init == "config"
    return {
        "dtype": dtype_of(config.run, world),
        "micro_batch_size": config.train.micro_batch_size,
        "micro_batch_tokens": config.train.micro_batch_tokens,
        "training": training_of(config.optimizer, schedule_of(config.train, steps)),
        "config": new_model_config(config.policy.config or {}, tokenizer) if new else None,
        "seed": config.run.seed,
        "deepspeed_extra": config.deepspeed,
        "lora": config.policy.lora,
    }


def _tokenizer(config: PretrainConfig) -> Any:
    """The one that the config names, or a new one trained on `data.tokenizer_text` (the same on every rank)."""
    data = config.data
    if data.tokenizer != "train":
        return tokenizer_of(data, config.policy.init)
    assert data.vocab_size is not None
    texts = (read_document(record, data.keys) for record in read_sources(data.tokenizer_text or data.train))
    return train_tokenizer(texts, data.vocab_size)
