"""What the batch settings come to, in words: printed once by rank 0 before the first step."""

from __future__ import annotations

from math import ceil

from gearshift.rlhf.ppo_settings import PpoSettings
from gearshift.rlhf.settings import CompareConfig, Config, PpoConfig, PretrainConfig, RewardConfig, SftConfig
from gearshift.rlhf.train_settings import TrainSettings


def batch_arithmetic(config: Config, ranks: int, steps: int | None = None) -> list[str]:
    """Lines for the screen. `steps`: optimizer steps of the whole run, where only the data can tell."""
    if isinstance(config, PpoConfig):
        return _ppo(config, ranks)
    if isinstance(config, PretrainConfig):
        return _train(config, ranks, steps)
    if isinstance(config, CompareConfig):
        return [_rollouts(config.rollout.tp_size, ranks)]
    return []


def _ppo(config: PpoConfig, ranks: int) -> list[str]:
    ppo = config.ppo
    per_rank = ppo.minibatch_size // ranks
    steps = ppo.minibatches * ppo.epochs
    passes = f"{_n(ppo.minibatches, 'minibatch')} x {_n(ppo.epochs, 'epoch')}"
    micro = _micro(per_rank, ppo)
    lines = [
        f"iteration    {_n(ppo.batch_size, 'episode')}, {ppo.batch_size // ranks} per rank on {_n(ranks, 'rank')}; "
        f"{_n(ppo.iterations, 'iteration')} make {_n(ppo.episodes, 'episode')}",
        _rollouts(config.rollout.tp_size, ranks, ppo.batch_size, ppo.answers),
        f"minibatch    {_n(ppo.minibatch_size, 'episode')}, {per_rank} per rank in {micro}",
    ]
    if config.ptx.weight > 0:
        examples = ppo.minibatch_size * config.ptx.examples_per_episode
        micro = _micro(examples // ranks, ppo)
        lines.append(
            f"pretraining  {_n(examples, 'example')} of {config.ptx.max_tokens} tokens per minibatch, "
            f"{examples // ranks} per rank in {micro}"
        )
    lines.append(
        f"optimizer    {_n(steps, 'step')} per iteration ({passes}), "
        f"{steps * ppo.iterations} in total, by policy and critic each"
    )
    return lines


def _train(config: PretrainConfig, ranks: int, steps: int | None) -> list[str]:
    train = config.train
    row = "sequence"
    if isinstance(config, RewardConfig):
        row = "prompt" if config.train.pairs == "kwise" else "pair"
    per_rank = train.batch_size // ranks
    total = f", {steps} in total" if steps is not None else ""
    fraction = config.train.pretraining_fraction if isinstance(config, SftConfig) else 0
    text = f" (about {fraction:.0%} pretraining text)" if fraction else ""
    micro = _micro(per_rank, train, "row" if row == "sequence" else row)
    return [
        f"step         {_n(train.batch_size, row)}{text}, {per_rank} per rank on {_n(ranks, 'rank')} in {micro}",
        f"optimizer    one step per batch, {_n(train.epochs, 'epoch')}{total}",
    ]


def _rollouts(tp_size: int, ranks: int, rows: int | None = None, answers: int = 1) -> str:
    groups = ranks // tp_size
    share = f", {_n(rows // groups, 'prompt' if answers == 1 else 'answer')} each" if rows else ""
    share += f" ({answers} to a prompt)" if answers > 1 else ""
    return f"rollouts     {_n(groups, 'group')} of {_n(tp_size, 'rank')} (tensor parallel){share}"


def _micro(rows: int, settings: PpoSettings | TrainSettings, row: str = "row") -> str:
    size, tokens = settings.micro_batch_size, settings.micro_batch_tokens
    if tokens is not None:
        return f"micro-batches of at most {_n(tokens, 'token')}"
    return f"{_n(ceil(rows / size), 'micro-batch')} of at most {_n(size, row)}"


def _n(count: int, what: str) -> str:
    if count == 1:
        return f"1 {what}"
    return f"{count} {what}{'es' if what.endswith('ch') and not what.endswith('epoch') else 's'}"
