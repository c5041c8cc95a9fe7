"""From rollouts to episodes, held against plain loops over python numbers; and the minibatches."""

import math
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.engine import Episodes, Rollouts, World
from gearshift.rlhf.episodes import build_episodes, episode_metrics, minibatches
from gearshift.rlhf.ppo_settings import KlSettings, PpoSettings, ScoreSettings
from gearshift.rlhf.scores import ScoreShaper
from tests.worker_group import WorkerGroup

ROWS, LONGEST = 12, 6
ALONE = World(0, 1, 0, 1, torch.device("cpu"))
Scored = tuple[Rollouts, Tensor, Tensor, Tensor]


def scored_rollouts(seed: int = 0) -> Scored:
    """Rollouts of lengths 1 to 6, scores, reference log-probs and values; masked places hold what must be ignored."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(LONGEST) < torch.randint(1, LONGEST + 1, (ROWS, 1), generator=g)
    row = torch.arange(ROWS)
    rollouts = Rollouts(
        torch.randint(3, 90, (ROWS, 5), generator=g),
        torch.randint(1, 6, (ROWS,), generator=g),
        row + 40,
        row // 3 + 700,
        row * 0,
        torch.randint(3, 90, (ROWS, LONGEST), generator=g),
        -3 * torch.rand(ROWS, LONGEST, generator=g) * mask,
        mask,
        torch.rand(ROWS, generator=g) < 0.6,
    )
    ref_logprobs = -3 * torch.rand(ROWS, LONGEST, generator=g) * mask
    return rollouts, torch.randn(ROWS, generator=g), ref_logprobs, torch.randn(ROWS, LONGEST, generator=g) * mask


def share_of(world: World, scored: Scored) -> Scored:
    """This rank's rows, as narrow as its longest response."""
    rollouts, *others = scored
    part = world.share(len(rollouts))
    mine = rollouts.select(part)
    width = int(mine.mask.sum(1).max())
    cut = {name: getattr(mine, name)[:, :width] for name in ("responses", "logprobs", "mask")}
    fields = {name: getattr(mine, name) for name in Rollouts.__dataclass_fields__}
    scores, ref_logprobs, values = (tensor[part] for tensor in others)
    return Rollouts(**{**fields, **cut}), scores, ref_logprobs[:, :width], values[:, :width]


def built(scored: Scored, ppo: PpoSettings, kl_coef: float, world: World = ALONE) -> Episodes:
    rollouts, scores, ref_logprobs, values = scored
    shaper = ScoreShaper(ppo.scores)
    return build_episodes(rollouts, scores, ref_logprobs, values, ppo, kl_coef, world, shaper=shaper)


class Naive:
    """Rewards, returns and advantages [row][token] as lists of floats; one token after the other, from the end."""

    def __init__(self, scored: Scored, ppo: PpoSettings, kl_coef: float):
        rollouts, scores, ref_logprobs, values = scored
        self.lengths = [int(n) for n in rollouts.mask.sum(1)]
        self.logprobs = [rollouts.logprobs[b, :n].tolist() for b, n in enumerate(self.lengths)]
        self.ratios = [
            [p - q for p, q in zip(self.logprobs[b], ref_logprobs[b].tolist(), strict=False)] for b in range(ROWS)
        ]
        self.kl = [[_estimate(r, ppo.kl.estimator) for r in row] for row in self.ratios]
        self.rewards, self.returns, self.advantages = [], [], []
        self.values = [values[b, :n].tolist() for b, n in enumerate(self.lengths)]
        for b in range(ROWS):
            rewards = [-kl_coef * k if ppo.kl.where == "reward" else 0.0 for k in self.kl[b]]
            rewards[-1] += _shaped(scores.tolist(), rollouts.finished.tolist(), ppo.scores)[b]
            self.rewards.append(rewards)
        if ppo.whiten_rewards:
            _, deviation = _moments(list(chain(*self.rewards)))
            mean = sum(chain(*self.rewards)) / sum(self.lengths)
            self.rewards = [[mean + (r - mean) / deviation for r in row] for row in self.rewards]
        self._estimate(self.rewards, rollouts.draws.tolist(), ppo)

    def _estimate(self, every: list[list[float]], draws: list[int], ppo: PpoSettings) -> None:
        if ppo.advantage != "gae":
            self._against_others([sum(row) for row in every], draws, ppo.advantage)
            return
        for b, (n, rewards) in enumerate(zip(self.lengths, every, strict=True)):
            advantages = [0.0] * n
            for t in reversed(range(n)):
                after, later = (self.values[b][t + 1], advantages[t + 1]) if t + 1 < n else (0.0, 0.0)
                delta = rewards[t] + ppo.gamma * after - self.values[b][t]
                advantages[t] = delta + ppo.gamma * ppo.lam * later
            self.advantages.append(advantages)
            self.returns.append([a + v for a, v in zip(advantages, self.values[b], strict=True)])
        if ppo.whiten:
            mean, deviation = _moments(list(chain(*self.advantages)))
            self.advantages = [[(a - mean) / deviation for a in row] for row in self.advantages]

    def _against_others(self, totals: list[float], draws: list[int], method: str) -> None:
        for total, draw, n in zip(totals, draws, self.lengths, strict=True):
            group = [t for t, d in zip(totals, draws, strict=True) if d == draw]
            others = (sum(group) - total) / (len(group) - 1)
            advantage = total - others
            if method == "grpo":
                mean = sum(group) / len(group)
                deviation = math.sqrt(sum((t - mean) ** 2 for t in group) / (len(group) - 1))
                advantage = (total - mean) / (deviation + 1e-4)
            self.advantages.append([advantage] * n)
            self.returns.append([total] * n)


def _moments(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))


def _shaped(scores: list[float], finished: list[bool], settings: ScoreSettings) -> list[float]:
    """As of the first iteration: the running moments are those of these scores."""
    shaped = [s - (0.0 if f else settings.missing_eos_penalty) for s, f in zip(scores, finished, strict=True)]
    if settings.normalize:
        mean, deviation = _moments(shaped)
        shaped = [(s - mean) / deviation for s in shaped]
    bound = settings.clip or math.inf
    return [min(bound, max(-bound, s)) for s in shaped]


def _estimate(ratio: float, estimator: str) -> float:
    return {"k1": ratio, "k2": ratio * ratio / 2, "k3": math.exp(-ratio) - 1 + ratio}[estimator]


def assert_rows(found: Tensor, expected: list[list[float]]) -> None:
    for b, row in enumerate(expected):
        assert found[b, : len(row)].tolist() == pytest.approx(row, abs=2e-5)
        assert (found[b, len(row) :] == 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"whiten": False},
        {"gamma": 0.9, "lam": 0.7, "whiten": False},
        {"kl": KlSettings(estimator="k2")},
        {"kl": KlSettings(estimator="k3"), "whiten": False},
        {"kl": KlSettings(where="loss", estimator="k3")},
        {"whiten_rewards": True},
        {"whiten_rewards": True, "whiten": False, "gamma": 0.9},
        {"advantage": "grpo", "kl": KlSettings(where="loss", estimator="k3")},
        {"advantage": "rloo", "kl": KlSettings(estimator="k2")},
        {"scores": ScoreSettings(missing_eos_penalty=1.5, normalize=True, clip=0.8), "whiten": False},
    ],
)
def test_targets_are_those_of_a_loop(settings: dict[str, Any]) -> None:
    ppo, scored = PpoSettings(**settings), scored_rollouts()
    episodes, naive = built(scored, ppo, 0.3), Naive(scored, ppo, 0.3)
    assert_rows(episodes.rewards, naive.rewards)
    assert_rows(episodes.kl, naive.kl)
    assert_rows(episodes.returns, naive.returns)
    assert_rows(episodes.advantages, naive.advantages)
    for name in Rollouts.__dataclass_fields__:
        assert torch.equal(getattr(episodes, name), getattr(scored[0], name))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def variance(values: list[float]) -> float:
    return mean([(v - mean(values)) ** 2 for v in values])


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_metrics_are_those_of_a_loop(estimator: Any) -> None:
    ppo, scored = PpoSettings(kl=KlSettings(estimator=estimator)), scored_rollouts(1)
    found, naive = episode_metrics(built(scored, ppo, 0.3), 0.3), Naive(scored, ppo, 0.3)
    scores = scored[1].tolist()
    returns, values = list(chain(*naive.returns)), list(chain(*naive.values))
    errors = [r - v for r, v in zip(returns, values, strict=True)]
    expected = {
        "objective/kl": mean([sum(row) for row in naive.ratios]),
        "objective/kl_coef": 0.3,
        "objective/scores": mean(scores),
        "objective/scores_std": math.sqrt(variance(scores)),
        "objective/rlhf_reward": mean([sum(row) for row in naive.rewards]),
        "objective/entropy": mean([-sum(row) for row in naive.logprobs]),
        "critic/explained_variance": 1 - variance(errors) / variance(returns),
        "rollout/length": mean([float(n) for n in naive.lengths]),
        "rollout/finished": mean([float(f) for f in scored[0].finished]),
    }
    assert found == pytest.approx(expected, abs=1e-5)


def built_here(world: World, ppo: PpoSettings) -> Episodes:
    return built(share_of(world, scored_rollouts()), ppo, 0.3, world)


def test_two_ranks_build_the_episodes_of_one(two_ranks: WorkerGroup) -> None:
    """Bit for bit, on both; whitened over the whole batch, not over each rank's half."""
    ppo = PpoSettings()
    one = built(scored_rollouts(), ppo, 0.3)
    for found in two_ranks.run(built_here, ppo):
        for name in Episodes.__dataclass_fields__:
            assert torch.equal(getattr(found, name), getattr(one, name)), name


def ids_of(ppo: PpoSettings, seed: int, iteration: int, world: World) -> list[list[int]]:
    episodes = built(scored_rollouts(), ppo, 0.3)
    return [part.ids.tolist() for part in minibatches(episodes, ppo, seed, iteration, world)]


def test_minibatches_hold_every_row_once_per_epoch() -> None:
    ppo = PpoSettings(batch_size=ROWS, minibatches=3, epochs=2)
    parts = ids_of(ppo, 0, 1, ALONE)
    assert [len(part) for part in parts] == [4] * 6
    first, second = list(chain(*parts[:3])), list(chain(*parts[3:]))
    assert sorted(first) == sorted(second) == list(range(40, 40 + ROWS))
    assert first != second
    assert first != sorted(first)


def test_shuffles_depend_on_seed_and_iteration_alone() -> None:
    ppo = PpoSettings(batch_size=ROWS, minibatches=3, epochs=2)
    assert ids_of(ppo, 0, 1, ALONE) == ids_of(ppo, 0, 1, ALONE)
    orders = [str(ids_of(ppo, seed, iteration, ALONE)) for seed in range(3) for iteration in range(1, 4)]
    assert len(set(orders)) == 9


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ranks_parts_are_the_minibatch_of_one_rank(ranks: int) -> None:
    ppo = PpoSettings(batch_size=ROWS, minibatches=3, epochs=2)
    worlds = [World(rank, ranks, rank, ranks, torch.device("cpu")) for rank in range(ranks)]
    parts = [ids_of(ppo, 5, 2, world) for world in worlds]
    together = [sorted(chain(*step)) for step in zip(*parts, strict=True)]
    assert together == [sorted(step) for step in ids_of(ppo, 5, 2, ALONE)]
    assert {len(part) for rank in parts for part in rank} == {4 // ranks}
    sizes = dict(zip(scored_rollouts()[0].ids.tolist(), scored_rollouts()[0].sizes.tolist(), strict=True))

    def spread(shares: list[list[int]]) -> int:
        tokens = [sum(sizes[row] for row in share) for share in shares]
        return max(tokens) - min(tokens)

    if ranks == 2:  # four ranks have a row each
        cut = [[step[:2], step[2:]] for step in ids_of(ppo, 5, 2, ALONE)]
        assert sum(spread(list(step)) for step in zip(*parts, strict=True)) < sum(map(spread, cut))
