"""PPO and PPO-ptx (InstructGPT 3.5 and C.4): the step reads as the algorithm."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gearshift import kernels
from gearshift.engine import (
    CausalModel,
    Episodes,
    HybridEngine,
    Prompts,
    RewardModel,
    Rollouts,
    TokenBatch,
    World,
    init_distributed,
)
from gearshift.engine.causal import WithoutAdapters
from gearshift.engine.memory import peak_bytes
from gearshift.engine.zero import Schedule, ZeroModel
from gearshift.errors import UserError
from gearshift.kernels import Loss
from gearshift.rlhf.best import Best
from gearshift.rlhf.data.batches import collate_prompts, collate_text
from gearshift.rlhf.data.encoding import Encoder, PromptRow
from gearshift.rlhf.data.sampling import Sampler, rank_part
from gearshift.rlhf.episodes import build_episodes, episode_metrics, minibatches
from gearshift.rlhf.guards import require_finite, stopping
from gearshift.rlhf.kl import KlController, kl_penalty
from gearshift.rlhf.language import language_loss, text_batches
from gearshift.rlhf.reporting import Phases, Report
from gearshift.rlhf.resuming import Saver, Stateful
from gearshift.rlhf.rewards import Asked, Reward, load_reward
from gearshift.rlhf.schedules import constant
from gearshift.rlhf.scores import ScoreShaper, importance_weights
from gearshift.rlhf.settings import PpoConfig
from gearshift.rlhf.setup import (
    at_least,
    dtype_of,
    encoder_of,
    lacks_value_head,
    load_rows,
    require_critic_start,
    require_same_tokens,
    sampling_of,
    save_policy,
    text_blocks,
    tokenizer_of,
    training_of,
)
from gearshift.rlhf.supervised import SCORE, evaluate


@dataclass
class Models:
    """The models of PPO. `reference` and `reward_model` are frozen; without GAE there is no critic."""

    policy: HybridEngine
    critic: RewardModel | None
    reference: CausalModel | WithoutAdapters
    reward_model: Reward


class Ppo:
    """One run of PPO: the models, the data and where it stands."""

    def __init__(self, config: PpoConfig, world: World, models: Models, data: PpoData, report: Report):
        self.config, self.world, self.data, self.report = config, world, data, report
        self.policy, self.critic = models.policy, models.critic
        self.reference, self.reward_model = models.reference, models.reward_model
        self.kl, self.shaper = KlController(config.ppo.kl), ScoreShaper(config.ppo.scores)
        self.sampling = sampling_of(config.rollout, data.tokenizer, self.policy.module, config.run.seed)

    def iteration(self, number: int) -> dict[str, float]:
        """Roll out, score, update; returns the iteration's metrics."""
        phases, sums = Phases(), _Sums()
        prompts = next(self.data.prompts)
        with phases.phase("generation"), self.policy.rollout() as generator:
            rollouts = generator.generate(prompts, self.sampling)
        with phases.phase("score"):
            scores = self.reward_model.score(rollouts)
            held = self.held_against_reference(rollouts)
            gap = self.logprob_gap(rollouts, held.trained)
            rollouts, weights = self.as_trained(rollouts, held.trained)
            values = None if self.critic is None else self.critic.values(rollouts)
            episodes = build_episodes(
                rollouts,
                scores,
                held.ref_logprobs,
                values,
                self.config.ppo,
                self.kl.coef,
                self.world,
                shaper=self.shaper,
                kl=held.kl,
                weights=weights,
            )
            self.check_finite(episodes, number)
        metrics = episode_metrics(episodes, self.kl.coef, self.critic is not None)
        metrics |= {"rollout/logprob_gap": gap, "optimizer/learning_rate": self.policy.learning_rate}
        if self.critic is not None:
            metrics["optimizer/critic_learning_rate"] = self.critic.learning_rate
        with phases.phase("train"):
            self.updates(episodes, number, sums)
        self.kl.update(metrics["objective/kl"], len(episodes))
        self.sample_table(number, episodes)
        return (
            metrics | sums.metrics() | self.timings(phases, episodes) | {"objective/episodes": number * len(episodes)}
        )

    def updates(self, episodes: Episodes, number: int, sums: _Sums) -> None:
        """Minibatch by minibatch; the policy stops early where `ppo.stop.approx_kl` says so, the critic does not."""
        ppo, bound = self.config.ppo, self.config.ppo.stop.approx_kl
        policy_moves = number > ppo.critic_iterations
        for minibatch in minibatches(episodes, ppo, self.config.run.seed, number, self.world):
            with stopping(self.config.run.folder, f"iteration {number}", minibatch, self.world):
                if policy_moves:
                    approx_kl = self.update_policy(minibatch, sums)
                    policy_moves = bound is None or approx_kl <= bound
                self.update_critic(minibatch, sums)

    def update_policy(self, minibatch: Episodes, sums: _Sums) -> float:
        """One optimizer step with both gradients; returns the minibatch's mean approximate KL before it, nats."""
        found = self.policy.accumulate(self.policy_loss, minibatch)
        sums.add("policy", found)
        if self.config.ptx.weight > 0:
            text = next(self.data.pretraining)
            sums.add("ptx", self.policy.accumulate(language_loss, text, weight=self.config.ptx.weight))
        sums.norm("policy", self.policy.step())
        return float(found["approx_kl"] / found["tokens"].clamp(min=1))

    def update_critic(self, minibatch: Episodes, sums: _Sums) -> None:
        if self.critic is not None:
            sums.add("value", self.critic.accumulate(self.value_loss, minibatch))
            sums.norm("critic", self.critic.step())

    def held_against_reference(self, rollouts: Rollouts) -> _Held:
        """What reference and, where it is asked for, the policy's training forward say of the answers. Collective."""
        ppo, temperature = self.config.ppo, self.sampling.temperature
        if ppo.kl.estimator == "exact":
            logprobs, ref_logprobs, kl = self.policy.against(self.reference, rollouts, temperature)
            return _Held(ref_logprobs, kl, logprobs)
        trained = self.policy.logprobs(rollouts, temperature) if ppo.old_logprobs == "training" else None
        return _Held(self.reference.logprobs(rollouts, temperature), None, trained)

    def as_trained(self, rollouts: Rollouts, trained: Tensor | None) -> tuple[Rollouts, Tensor | None]:
        """With `old_logprobs: training` the ratio is against these; and the weights that make up for it, or None."""
        ppo = self.config.ppo
        if ppo.old_logprobs == "rollout" or trained is None:
            return rollouts, None
        weights = None
        if ppo.importance_cap is not None:
            weights = importance_weights(trained, rollouts.logprobs, rollouts.mask, ppo.importance_cap)
        return dataclasses.replace(rollouts, logprobs=trained), weights

    def policy_loss(self, policy: CausalModel, batch: Episodes, count: Tensor) -> Loss:
        """The clipped surrogate on a micro-batch; `count`: response tokens of the global minibatch."""
        # Both log-probs are of the whole softmax, whatever top_k and top_p left to draw from: the ratio starts at 1.
        ppo = self.config.ppo
        logprobs, entropy = policy.response_logprobs(batch, self.sampling.temperature, entropy=True)
        assert entropy is not None
        # The loss is linear in the advantages, and weights are not negative: as good as a factor of each term.
        found = kernels.policy_loss(
            logprobs,
            batch.logprobs,
            batch.advantages * batch.weights,
            batch.mask,
            clip=ppo.clip,
            dual_clip=ppo.dual_clip,
            tokens=count,
        )
        metrics = found.metrics | {"entropy": entropy.detach().double().sum()}
        if ppo.kl.where == "reward":
            return Loss(found.loss, metrics)
        kl = kl_penalty(logprobs, batch.ref_logprobs, batch.mask, ppo.kl.estimator).sum()
        return Loss(found.loss + self.kl.coef * kl / count, metrics)

    def value_loss(self, critic: RewardModel, batch: Episodes, count: Tensor) -> Loss:
        """The clipped value loss on a micro-batch."""
        values = critic.response_values(batch)
        return kernels.value_loss(
            values, batch.values, batch.returns, batch.mask, clip=self.config.ppo.value_clip, tokens=count
        )

    def logprob_gap(self, rollouts: Rollouts, trained: Tensor | None) -> float:
        """|rollout − training forward| log-prob, nats: over all rows where `trained` has the latter, else over the
        first micro-batch of every rank. Collective.

        The largest in fp32, where the two differ by rounding alone; the mean in bf16. Raises UserError past
        `rollout.logprob_gap_limit`: PPO's ratio would start away from 1.
        """
        some = rollouts
        if trained is None:
            some = rollouts.select(slice(0, self.policy.micro_batch_size))
            trained = self.policy.logprobs(some, self.sampling.temperature)
        gaps = (trained - some.logprobs).abs()[some.mask]
        exact = self.policy.dtype == torch.float32
        gap = self.world.max(float(gaps.max() if exact else gaps.mean()))
        limit = self.config.rollout.gap_limit("fp32" if exact else "bf16")
        if not gap <= limit:
            raise UserError(
                f"rollout.logprob_gap_limit: rollout and training log-probs differ by {gap:.3g} nats, limit {limit:.3g}"
            )
        return gap

    def check_finite(self, episodes: Episodes, number: int) -> None:
        """Stops every rank before any weight moves, and writes the episodes out."""
        with stopping(self.config.run.folder, f"iteration {number}", episodes, self.world):
            require_finite(episodes, self.world)

    def is_spent(self, metrics: dict[str, float]) -> bool:
        """The policy has lost the entropy that `ppo.stop.entropy` asks for: the run ends with this iteration."""
        least, entropy = self.config.ppo.stop.entropy, metrics["objective/entropy"]
        if least is None or entropy >= least:
            return False
        self.report.say(f"ppo.stop.entropy: {entropy:.3g} nats per response, bound {least:g}: the run ends here")
        return True

    def near_reference(self, found: dict[str, float]) -> bool:
        """Whether a validation's KL allows the policy to be the best one (`ppo.best_kl`)."""
        limit = self.config.ppo.best_kl
        return limit is None or found["validation/kl"] <= limit

    def save(self, folder: str) -> None:
        """`folder`/model, of the averaged weights where they are kept. Collective."""
        with self.policy.averaged():
            save_policy(self.policy, folder, self.config.policy, self.data.tokenizer)

    def timings(self, phases: Phases, episodes: Episodes) -> dict[str, float]:
        """Seconds per phase; the shift is told apart from the generation that it precedes, and from what it costs to
        free memory between rollouts (weights not kept, CUDA graphs captured again, optimizer state moved to the host
        and back)."""
        policy = self.policy
        gears = {
            "shift": policy.shift_seconds,
            "allocation": policy.allocation_seconds,
            "capture": policy.capture_seconds,
            "offload": policy.offload_seconds,
        }
        generation = phases.seconds["generation"] - sum(gears.values())
        seconds = phases.seconds | gears | {"generation": generation}
        total = phases.total()
        tokens = int(episodes.lengths.sum() + episodes.mask.sum())
        return {f"timing/{name}": value for name, value in seconds.items()} | {
            "timing/step": total,
            "shift/bytes_inside_host": float(policy.shift_bytes - policy.shift_bytes_between_hosts),
            "shift/bytes_between_hosts": float(policy.shift_bytes_between_hosts),
            "throughput/tokens_per_second": tokens / total,
            "throughput/tokens_per_second_per_rank": tokens / total / self.world.size,
            "memory/peak_gib": self.world.max(peak_bytes(self.world.device)) / 2**30,
        }

    def sample_table(self, number: int, episodes: Episodes) -> None:
        every = self.config.ppo.samples_every
        if not every or (number - 1) % every:
            return
        rows = []
        for b in range(min(self.config.tracking.samples, len(episodes))):
            kl = (episodes.logprobs[b] - episodes.ref_logprobs[b])[episodes.mask[b]].sum()
            rows.append(
                {
                    "prompt": self.data.decode(episodes.tokens[b, : episodes.lengths[b]]),
                    "response": self.data.decode(episodes.responses[b][episodes.mask[b]]),
                    "score": float(episodes.scores[b]),
                    "kl": float(kl),
                    "finished": bool(episodes.finished[b]),
                }
            )
        self.report.samples(number, rows)

    def validate(self) -> dict[str, float]:
        """Scores on held-out prompts and KL there, loss on held-out pretraining text: of the averaged weights, where
        `ppo.ema` keeps them. Collective."""
        with self.policy.averaged():
            return self._validate()

    def _validate(self) -> dict[str, float]:
        found = {}
        if self.data.held_out_text:
            sums = evaluate(self.policy, language_loss, self.data.held_out_text, collate_text)
            found["loss/pretraining_heldout"] = float(sums["loss"])
        rows = self.data.held_out_prompts
        if rows:
            own = rows[self.world.share(len(rows))]
            with self.policy.rollout() as generator:
                answers = generator.generate(collate_prompts(own or rows[:1]), self.sampling)
            scores = self.reward_model.score(answers)
            ref_logprobs = self.held_against_reference(answers).ref_logprobs
            kl = ((answers.logprobs - ref_logprobs) * answers.mask).sum(1)
            both = torch.stack([scores, kl, torch.ones_like(scores)])[:, : len(own)]  # others only took part
            total = self.world.sum(both.double().sum(1))
            found[SCORE], found["validation/kl"] = float(total[0] / total[2]), float(total[1] / total[2])
        return found


@dataclass
class _Held:
    """`ref_logprobs [B, L]`; with the exact estimator `kl [B, L]` to the reference; `trained [B, L]`: the policy's
    log-probs by its training forward, where something asks for them."""

    ref_logprobs: Tensor
    kl: Tensor | None
    trained: Tensor | None


class _Sums:
    """Sums of an iteration's minibatches, divided once at the end."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._norms: dict[str, list[float]] = {}
        self._losses: dict[str, list[float]] = {}

    def add(self, what: str, sums: dict[str, Tensor]) -> None:
        self._losses.setdefault(what, []).append(float(sums["loss"]))
        for name, value in sums.items():
            self._sums[f"{what}/{name}"] = self._sums.get(f"{what}/{name}", 0.0) + float(value)

    def norm(self, what: str, value: float) -> None:
        self._norms.setdefault(what, []).append(value)

    def metrics(self) -> dict[str, float]:
        found = {f"loss/{what}_avg": sum(losses) / len(losses) for what, losses in self._losses.items()}
        found |= {f"{what}/grad_norm": sum(norms) / len(norms) for what, norms in self._norms.items()}
        found["policy/updates"] = len(self._norms.get("policy", []))
        for what, total, name in _MEANS:
            if f"{what}/tokens" in self._sums:  # not of a model that was not updated
                found[name] = self._sums[f"{what}/{total}"] / max(1.0, self._sums[f"{what}/tokens"])
        return found


# Of which loss, which of its sums over tokens, and what its mean is called.
_MEANS = (
    ("policy", "approx_kl", "policy/approxkl_avg"),
    ("policy", "clipped", "policy/clipfrac_avg"),
    ("policy", "entropy", "policy/entropy_avg"),
    ("policy", "ratio", "val/ratio"),
    ("value", "clipped", "critic/clipfrac_avg"),
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
            pretraining=_pretraining(config, text_encoder, world, cursors, report),
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


def _pretraining(
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


def load_models(config: PpoConfig, world: World, data: PpoData) -> Models:
    """Policy and critic that train, reference and reward model that do not."""
    ppo, dtype = config.ppo, dtype_of(config.run, world)
    steps_per_iteration = ppo.minibatches * ppo.epochs
    schedule = constant(ppo.warmup_iterations * steps_per_iteration, first=ppo.warmup_from)
    common: dict[str, Any] = {
        "dtype": dtype,
        "micro_batch_size": ppo.micro_batch_size,
        "deepspeed_extra": config.deepspeed,
    }
    policy = HybridEngine.load(
        config.policy.init,
        world,
        training=training_of(config.optimizer, schedule, average=ppo.ema),
        tp_size=config.rollout.tp_size,
        slots=config.rollout.slots,
        bucket_bytes=config.rollout.bucket_mb << 20,
        lora=config.policy.lora,
        keep_weights=config.rollout.keep_weights,
        attention=config.rollout.attention,
        cuda_graphs=config.rollout.cuda_graphs,
        offload_optimizer=config.rollout.offload_optimizer,
        **common,
    )
    return Models(
        policy,
        _critic(config, world, schedule, common) if config.has_critic else None,
        _reference(config, world, policy, common),
        load_reward(config.reward, data.asked, world, **common),
    )


def _critic(config: PpoConfig, world: World, schedule: Schedule, common: dict[str, Any]) -> RewardModel:
    """A copy of the reward model, or a model of its own, which gets a new value head where it has none."""
    init = config.reward.init if config.critic_is_reward else config.critic.init
    return RewardModel.load(
        init,
        world,
        training=training_of(config.optimizer, schedule, config.critic.learning_rate),
        new_head=lacks_value_head(init),
        seed=config.run.seed,
        **common,
    )


def _reference(
    config: PpoConfig, world: World, policy: CausalModel, common: dict[str, Any]
) -> CausalModel | WithoutAdapters:
    """The policy as it starts (with adapters: the policy with them off, no second copy), or a model of its own."""
    if config.reference.init != "policy":
        return CausalModel.load(config.reference.init, world, **common)
    if config.policy.lora is not None:
        return policy.without_adapters()
    return CausalModel.load(config.policy.init, world, **common)


def ppo(config: PpoConfig, report: Report) -> None:
    """Train a policy against a reward model; with `ptx.coef` above 0 this is PPO-ptx."""
    world = init_distributed()
    data = PpoData.load(config, world, report)
    run = Ppo(config, world, load_models(config, world, data), data, report)
    iterations, every = config.ppo.iterations, config.ppo.validate_every
    trained: dict[str, ZeroModel] = {"policy": run.policy}
    if run.critic is not None:
        trained["critic"] = run.critic
    best = Best(config.run.folder, world, report, run.save, resumes=config.checkpoint.resumes)
    parts: dict[str, Stateful] = {**data.cursors, "kl": run.kl, "scores": run.shaper, "best": best}
    saver = Saver(config, world, report, trained, parts, data.tokenizer)
    report.start([f"policy       {run.policy.parameters_total:,} parameters"], iterations, saver.done)
    for number in range(saver.done + 1, iterations + 1):
        before = run.validate() if number == 1 and every else {}
        metrics, found = run.iteration(number), {}
        ends = number == iterations or run.is_spent(metrics)
        if ends or (every and number % every == 0):
            found = run.validate()
        report.log(number, metrics | before | found)
        if SCORE in found and run.near_reference(found):
            best.offer(number, found[SCORE])
        saver.after(number, found.get(SCORE))
        if ends:
            break
    saver.close()
    run.save(config.run.folder)
    if run.critic is not None:
        run.critic.save_pretrained(f"{config.run.folder}/critic", data.tokenizer)
