"""The reward model: a prompt's ranked answers are one batch element (InstructGPT 3.5 and C.2).

Letters: B prompts, K answers to a prompt, S longest sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gearshift.engine import RewardModel, World, init_distributed
from gearshift.kernels import Loss
from gearshift.rlhf.calibration import accuracy_interval, calibration_error, pair_sums
from gearshift.rlhf.data.batches import ComparisonBatch, collate_comparisons
from gearshift.rlhf.data.encoding import Comparison, Demonstration, split_in_pairs
from gearshift.rlhf.data.sampling import Sampler
from gearshift.rlhf.reporting import Report
from gearshift.rlhf.resuming import Saver
from gearshift.rlhf.settings import RewardConfig
from gearshift.rlhf.setup import dtype_of, encoder_of, load_rows, schedule_of, tokenizer_of, training_of
from gearshift.rlhf.supervised import evaluate, fit


def reward_loss(model: RewardModel, batch: ComparisonBatch, count: Tensor) -> Loss:
    """Σ over prompts of −(1/pairs) Σ log σ(r_preferred − r_other − margin), over count, the prompts that have a pair.

    InstructGPT equation 1, with the mean over a prompt's pairs that are not ties; the margin is Llama 2's (2307.09288,
    equation 2), 0 where the data has none.
    """
    return _pair_loss(_gaps(model, batch), batch, count)


def held_out_loss(model: RewardModel, batch: ComparisonBatch, count: Tensor) -> Loss:
    """`reward_loss`, and the sums that accuracy and calibration are made from."""
    gaps = _gaps(model, batch)
    loss = _pair_loss(gaps, batch, count)
    return Loss(loss.loss, {**loss.metrics, **pair_sums(gaps, batch.pairs())})


def _gaps(model: RewardModel, batch: ComparisonBatch) -> Tensor:
    """`[B, K, K]` fp32: by how much answer i is rewarded above answer j."""
    rewards = answer_rewards(model, batch)
    return rewards[:, :, None] - rewards[:, None, :]


def _pair_loss(gaps: Tensor, batch: ComparisonBatch, count: Tensor) -> Loss:
    pairs = batch.pairs()
    per_prompt = pairs.flatten(1).sum(1).clamp(min=1)
    losses = -torch.where(pairs, logsigmoid(gaps - batch.margins[:, None, None]), 0.0).flatten(1).sum(1) / per_prompt
    return Loss(
        losses.sum() / count,
        {
            "tokens": batch.lengths.sum().double(),
            "pairs": pairs.sum().double(),
            "right": (pairs & (gaps > 0)).sum().double(),
        },
    )


def answer_rewards(model: RewardModel, batch: ComparisonBatch) -> Tensor:
    """Rewards [B, K] fp32 at each answer's last token, 0 for an absent one. Each answer is encoded once."""
    lengths = batch.lengths.flatten()
    present = lengths > 0
    if not bool(present.any()):  # a filler: ZeRO-3 needs its forward all the same
        present = present.clone()
        present[0] = True
    width = max(1, int(lengths.max()))
    own = lengths[present].clamp(min=1)
    tokens = batch.tokens.flatten(0, 1)[present][:, :width]
    values = model.values_at(own[:, None] - 1, tokens, own)[:, 0]
    rewards = values.new_zeros(lengths.shape).masked_scatter(present, values)
    return rewards.view_as(batch.lengths)


def reward(config: RewardConfig, report: Report) -> None:
    """Train a reward model from the SFT model's backbone and a new value head; set its bias on the demonstrations."""
    world = init_distributed()
    tokenizer = tokenizer_of(config.data, config.policy.init)
    encoder = encoder_of(config.data, tokenizer)
    rows = load_rows("data.train", config.data.train, encoder.comparisons, report)
    if config.train.pairs == "pairwise":
        rows = [pair for row in rows for pair in split_in_pairs(row)]
    held_out = load_rows("data.validation", config.data.validation, encoder.comparisons, report)
    demonstrations = load_rows("data.demonstrations", config.data.demonstrations, encoder.demonstrations, report)
    sampler = Sampler(len(rows), config.train.batch_size, config.run.seed)
    steps = sampler.steps(config.train.epochs)
    model = RewardModel.load(
        config.policy.init,
        world,
        dtype=dtype_of(config.run, world),
        micro_batch_size=config.train.micro_batch_size,
        micro_batch_tokens=config.train.micro_batch_tokens,
        training=training_of(config.optimizer, schedule_of(config.train, steps)),
        new_head=True,
        seed=config.run.seed,
        deepspeed_extra=config.deepspeed,
    )

    def validate() -> dict[str, float]:
        return measure(model, held_out) if held_out else {}

    saver = Saver(config, world, report, {"model": model}, {"rows": sampler}, tokenizer)
    report.start([f"model        {model.parameters_total:,} parameters"], steps, saver.done)
    batches = comparison_batches(rows, sampler, world)
    fit(model, reward_loss, batches, steps, report, validate, config.train.validate_every, saver)
    if demonstrations:
        model.bias = mean_demonstration_reward(model, demonstrations)
        report.say(f"reward bias {model.bias:+.4f}: the demonstrations' mean reward is now 0")
    model.config.pad_token_id = tokenizer.pad_token_id  # other loaders' classification heads look for it
    model.save_pretrained(f"{config.run.folder}/model", tokenizer)


def comparison_batches(rows: list[Any], sampler: Sampler, world: World) -> Iterator[ComparisonBatch]:
    """This rank's prompts of every global batch that the sampler draws."""
    for draw in sampler:
        yield collate_comparisons([rows[i] for i in draw.rows[world.rank :: world.size]])


def measure(model: RewardModel, rows: list[Any]) -> dict[str, float]:
    """Loss on held-out comparisons, and of their pairs: accuracy with its interval, calibration error. Collective."""
    sums = {name: float(value) for name, value in evaluate(model, held_out_loss, rows, collate_comparisons).items()}
    low, high = accuracy_interval(sums)
    return {
        "loss/validation": sums["loss"],
        "reward/accuracy": sums["right"] / max(1.0, sums["pairs"]),
        "reward/accuracy_low": low,
        "reward/accuracy_high": high,
        "reward/calibration_error": calibration_error(sums),
    }


def mean_demonstration_reward(model: RewardModel, rows: list[Demonstration]) -> float:
    """Mean reward of whole demonstrations, the present bias added back. Collective."""
    mine = [Comparison(row.prompt, [row.completion], [0.0]) for row in rows[model.world.share(len(rows))]]
    rewards = model.map(lambda micro: answer_rewards(model, micro)[:, 0], collate_comparisons(mine or [None]))
    sums = torch.tensor([float(rewards.double().sum()) if mine else 0.0, len(mine)], dtype=torch.float64)
    total, count = model.world.sum(sums.to(model.world.device))
    return float(total / count) + model.bias
