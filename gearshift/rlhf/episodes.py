"""From rollouts to episodes: rewards, advantages, returns; and the minibatches that an update is cut into."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.engine import Episodes, Rollouts, World
from gearshift.engine.balance import balanced
from gearshift.engine.exchange import gather_rows
from gearshift.kernels import Targets, ppo_targets
from gearshift.kernels.moments import WHITEN_EPSILON
from gearshift.rlhf.advantages import METHODS
from gearshift.rlhf.ppo_settings import PpoSettings
from gearshift.rlhf.scores import ScoreShaper


def build_episodes(
    rollouts: Rollouts,
    scores: Tensor,
    ref_logprobs: Tensor,
    values: Tensor | None,
    ppo: PpoSettings,
    kl_coef: float,
    world: World,
    *,
    shaper: ScoreShaper,
    kl: Tensor | None = None,
    weights: Tensor | None = None,
) -> Episodes:
    """The global batch of an iteration, the same on every rank. Collective.

    scores [B]; ref_logprobs, values (None without a critic), kl (in place of an estimate), weights (of tokens; None: 1)
    [B, L] of this rank's rollouts. Episodes are a few bytes a token, so every rank holds them all: whitening, shuffling
    and metrics are then those of the whole batch whatever the rank count.
    """
    nothing = torch.zeros_like(ref_logprobs)
    mine = Episodes(
        **{f.name: getattr(rollouts, f.name) for f in dataclasses.fields(rollouts)},
        ref_logprobs=ref_logprobs,
        values=nothing if values is None else values,
        scores=scores,
        rewards=nothing,
        kl=nothing if kl is None else kl,
        advantages=nothing,
        returns=nothing,
        weights=rollouts.mask.float() if weights is None else weights,
    )
    every, _ = gather_rows(mine, dist.group.WORLD if world.size > 1 else None)
    shaped = shaper(every.scores, every.finished)
    targets = _targets(every, shaped, ppo, kl_coef if ppo.kl.where == "reward" else 0.0, exact=kl is not None)
    return dataclasses.replace(
        every, rewards=targets.rewards, kl=targets.kl, advantages=targets.advantages, returns=targets.returns
    )


def _targets(every: Episodes, scores: Tensor, ppo: PpoSettings, kl_coef: float, exact: bool) -> Targets:
    def of(kl: Tensor | None, scores: Tensor, kl_coef: float, whiten: bool) -> Targets:
        return ppo_targets(
            every.logprobs,
            every.ref_logprobs,
            every.values,
            every.mask,
            scores,
            kl_coef=kl_coef,
            estimator="k1" if ppo.kl.estimator == "exact" else ppo.kl.estimator,
            kl=kl,
            gamma=ppo.gamma,
            lam=ppo.lam,
            whiten=whiten,
        )

    kl = every.kl if exact else None
    if ppo.advantage != "gae":
        targets = of(kl, scores, kl_coef, False)
        return targets._replace(**_against_others(every, targets.rewards, ppo))
    if not ppo.whiten_rewards:
        return of(kl, scores, kl_coef, ppo.whiten)
    targets = of(kl, scores, kl_coef, False)
    whitened = _deviation_one(targets.rewards, every.mask)
    # Given as a penalty: −1·(−r) is r.
    return of(-whitened, torch.zeros_like(scores), 1.0, ppo.whiten)._replace(kl=targets.kl)


def _deviation_one(rewards: Tensor, mask: Tensor) -> Tensor:
    """Divided so that the deviation over all response tokens is 1, the mean kept (N+, "whiten rewards")."""
    chosen = rewards[mask].double()
    scale = (chosen.var(correction=0) + WHITEN_EPSILON).rsqrt()
    return torch.where(mask, (rewards.double() - chosen.mean()) * scale + chosen.mean(), 0.0).float()


def _against_others(every: Episodes, rewards: Tensor, ppo: PpoSettings) -> dict[str, Tensor]:
    """One advantage and one return for all tokens of an answer."""
    total = rewards.double().sum(1)
    advantages = METHODS[ppo.advantage](total, every.draws)
    return {
        name: torch.where(every.mask, per_answer[:, None], 0.0).float()
        for name, per_answer in (("advantages", advantages), ("returns", total))
    }


def minibatches(episodes: Episodes, ppo: PpoSettings, seed: int, iteration: int, world: World) -> Iterator[Episodes]:
    """This rank's rows of each minibatch: `epochs` seeded shuffles of the global batch, cut in `minibatches` parts.

    Every rank gets as many rows of a minibatch, and about as many tokens.
    """
    size, sizes = len(episodes) // ppo.minibatches, episodes.sizes.cpu()
    for epoch in range(ppo.epochs):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + iteration) * 1_009 + epoch)
        order = torch.randperm(len(episodes), generator=generator).to(episodes.tokens.device)
        for rows in order.split(size):
            dealt = balanced(sizes[rows.cpu()].tolist(), world.size, most_rows=-(-len(rows) // world.size))
            yield episodes.select(rows[dealt[world.rank]])


def episode_metrics(episodes: Episodes, kl_coef: float, critic: bool = True) -> dict[str, float]:
    """What the iteration achieved, before its update. KL and entropy are sums over a response, means over responses.

    The entropy is estimated from the sampled tokens (−log π of each); explained variance is 1 − Var(R − V) / Var(R)
    over all response tokens, of a run with a critic.
    """
    mask = episodes.mask
    kl = (episodes.logprobs - episodes.ref_logprobs).double().mul(mask).sum(1).mean()
    scores = episodes.scores.double()
    explained = {"critic/explained_variance": _explained_variance(episodes)} if critic else {}
    return explained | {
        "objective/kl": float(kl),
        "objective/kl_coef": kl_coef,
        "objective/scores": float(scores.mean()),
        "objective/scores_std": float(scores.std(correction=0)),
        "objective/rlhf_reward": float(scores.mean() - kl_coef * episodes.kl.double().sum(1).mean()),
        "objective/entropy": float(-episodes.logprobs.double().mul(mask).sum(1).mean()),
        "rollout/length": float(mask.sum(1).double().mean()),
        "rollout/finished": float(episodes.finished.double().mean()),
    }


def _explained_variance(episodes: Episodes) -> float:
    returns, values = episodes.returns[episodes.mask].double(), episodes.values[episodes.mask].double()
    return float(1 - (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-12))
