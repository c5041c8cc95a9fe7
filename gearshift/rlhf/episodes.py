"""From rollouts to episodes: rewards, advantages, returns; and the minibatches that an update is cut into."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.engine import Episodes, Rollouts, World
from gearshift.engine.exchange import gather_rows
from gearshift.kernels import ppo_targets
from gearshift.rlhf.settings import PpoSettings


def build_episodes(
    rollouts: Rollouts,
    scores: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    ppo: PpoSettings,
    kl_coef: float,
    world: World,
    kl: Tensor | None = None,
) -> Episodes:
    """The global batch of an iteration, the same on every rank. Collective.

    scores [B], ref_logprobs, values and (in place of an estimate) kl [B, L] of this rank's rollouts. Episodes are a
    few bytes a token, so every rank holds them all: whitening, shuffling and metrics are then those of the whole batch
    whatever the rank count.
    """
    nothing = torch.zeros_like(values)
    mine = Episodes(
        **{f.name: getattr(rollouts, f.name) for f in dataclasses.fields(rollouts)},
        ref_logprobs=ref_logprobs,
        values=values,
        scores=scores,
        rewards=nothing,
        kl=nothing if kl is None else kl,
        advantages=nothing,
        returns=nothing,
    )
    every, _ = gather_rows(mine, dist.group.WORLD if world.size > 1 else None)
    targets = ppo_targets(
        every.logprobs,
        every.ref_logprobs,
        every.values,
        every.mask,
        every.scores,
        kl_coef=kl_coef,
        estimator="k1" if ppo.kl.estimator == "exact" else ppo.kl.estimator,
        kl=None if kl is None else every.kl,
        gamma=ppo.gamma,
        lam=ppo.lam,
        whiten=ppo.whiten,
    )
    return dataclasses.replace(
        every, rewards=targets.rewards, kl=targets.kl, advantages=targets.advantages, returns=targets.returns
    )


def minibatches(episodes: Episodes, ppo: PpoSettings, seed: int, iteration: int, world: World) -> Iterator[Episodes]:
    """This rank's rows of each minibatch: `epochs` seeded shuffles of the global batch, cut in `minibatches` parts."""
    size = len(episodes) // ppo.minibatches
    for epoch in range(ppo.epochs):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + iteration) * 1_009 + epoch)
        order = torch.randperm(len(episodes), generator=generator).to(episodes.tokens.device)
        for rows in order.split(size):
            yield episodes.select(rows[world.share(len(rows))])


def episode_metrics(episodes: Episodes, kl_coef: float) -> dict[str, float]:
    """What the iteration achieved, before its update. KL and entropy are sums over a response, means over responses.

    The entropy is estimated from the sampled tokens (−log π of each); explained variance is 1 − Var(R − V) / Var(R)
    over all response tokens.
    """
    mask = episodes.mask
    kl = (episodes.logprobs - episodes.ref_logprobs).double().mul(mask).sum(1).mean()
    scores = episodes.scores.double()
    returns, values = episodes.returns[mask].double(), episodes.values[mask].double()
    explained = 1 - (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-12)
    return {
        "objective/kl": float(kl),
        "objective/kl_coef": kl_coef,
        "objective/scores": float(scores.mean()),
        "objective/scores_std": float(scores.std(correction=0)),
        "objective/rlhf_reward": float(scores.mean() - kl_coef * episodes.kl.double().sum(1).mean()),
        "objective/entropy": float(-episodes.logprobs.double().mul(mask).sum(1).mean()),
        "critic/explained_variance": float(explained),
        "rollout/length": float(mask.sum(1).double().mean()),
        "rollout/finished": float(episodes.finished.double().mean()),
    }
