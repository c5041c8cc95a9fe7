"""PPO and PPO-ptx (InstructGPT 3.5 and C.4): the step reads as the algorithm."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gearshift import kernels
from gearshift.engine import (
    CausalModel,
    Episodes,
    RewardModel,
    Rollouts,
    World,
    init_distributed,
    spans,
    watchdog,
)
from gearshift.engine.spans import span
from gearshift.engine.zero import ZeroModel
from gearshift.kernels import Loss
from gearshift.rlhf.best import Best
from gearshift.rlhf.data.batches import collate_text
from gearshift.rlhf.episodes import build_episodes, episode_metrics, minibatches
from gearshift.rlhf.guards import require_finite, stopping
from gearshift.rlhf.kl import KlController, kl_penalty
from gearshift.rlhf.language import language_loss
from gearshift.rlhf.logprob_gap import LogprobGap
from gearshift.rlhf.ppo_data import PpoData
from gearshift.rlhf.ppo_metrics import UpdateSums, sample_rows, timings
from gearshift.rlhf.ppo_models import Models, load_models
from gearshift.rlhf.reporting import Phases, Report
from gearshift.rlhf.resuming import Saver, Stateful
from gearshift.rlhf.rewards import mean_over_prompts
from gearshift.rlhf.scores import ScoreShaper, importance_weights
from gearshift.rlhf.settings import PpoConfig
from gearshift.rlhf.setup import (
    sampling_of,
    save_policy,
)
from gearshift.rlhf.supervised import SCORE, evaluate


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
        phases, sums, metrics = Phases(), UpdateSums(), dict[str, float]()
        prompts = next(self.data.prompts)
        with phases.phase("generation"), self.policy.rollout() as generator:
            rollouts = generator.generate(prompts, self.sampling)
        with phases.phase("score"):
            with span("reward model"):
                scores = self.reward_model.score(rollouts)
            held = self.held_against_reference(rollouts)
            gap = self.logprob_gap()
            if held.trained is not None:
                gap.see(held.trained, rollouts.logprobs, rollouts.mask)
                metrics["rollout/logprob_gap"] = gap.check()
            rollouts, weights = self.as_trained(rollouts, held.trained)
            with span("critic"):
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
        metrics |= episode_metrics(episodes, self.kl.coef, self.critic is not None)
        metrics["optimizer/learning_rate"] = self.policy.learning_rate
        if self.critic is not None:
            metrics["optimizer/critic_learning_rate"] = self.critic.learning_rate
        with phases.phase("train"):
            metrics |= self.updates(episodes, number, sums, gap if held.trained is None else None)
        if number > self.config.ppo.critic_iterations:  # before, nothing that the coefficient could steer moves
            self.kl.update(metrics["objective/kl"], len(episodes))
        every = self.config.ppo.samples_every
        if every and (number - 1) % every == 0:
            self.report.samples(number, sample_rows(episodes, self.config.tracking.samples, self.data.decode))
        return (
            metrics
            | sums.metrics()
            | timings(self.policy, phases, episodes, self.world)
            | {"objective/episodes": number * len(episodes)}
        )

    def updates(
        self, episodes: Episodes, number: int, sums: UpdateSums, gap: LogprobGap | None = None
    ) -> dict[str, float]:
        """Minibatch by minibatch; the policy stops early where `ppo.stop.approx_kl` says so, the critic does not.

        `gap` is found in the first minibatch, whose forward is still of the policy that answered. Returns it.
        """
        found: dict[str, float] = {}
        ppo, bound = self.config.ppo, self.config.ppo.stop.approx_kl
        policy_moves = number > ppo.critic_iterations
        for minibatch in minibatches(episodes, ppo, self.config.run.seed, number, self.world):
            with stopping(self.config.run.folder, f"iteration {number}", minibatch, self.world):
                if policy_moves:
                    approx_kl = self.update_policy(minibatch, sums, gap)
                    policy_moves = bound is None or approx_kl <= bound
                    if gap is not None:
                        found["rollout/logprob_gap"], gap = gap.value, None
                self.update_critic(minibatch, sums)
        return found

    @span("policy")
    def update_policy(self, minibatch: Episodes, sums: UpdateSums, gap: LogprobGap | None = None) -> float:
        """One optimizer step with both gradients; returns the minibatch's mean approximate KL before it, nats.

        Raises EveryRank, before a weight moves, where `gap` is past its limit.
        """
        found = self.policy.accumulate(partial(self.policy_loss, gap=gap), minibatch)
        if gap is not None:
            gap.check()
        sums.add("policy", found)
        if self.config.ptx.weight > 0:
            text = next(self.data.pretraining)
            sums.add("ptx", self.policy.accumulate(language_loss, text, weight=self.config.ptx.weight))
        sums.norm("policy", self.policy.step())
        return float(found["approx_kl"] / found["tokens"].clamp(min=1))

    @span("critic")
    def update_critic(self, minibatch: Episodes, sums: UpdateSums) -> None:
        if self.critic is not None:
            sums.add("value", self.critic.accumulate(self.value_loss, minibatch))
            sums.norm("critic", self.critic.step())

    @span("reference")
    def held_against_reference(self, rollouts: Rollouts, trained: bool = True) -> _Held:
        """What reference and, where it is asked for, the policy's training forward say of the answers. Collective."""
        ppo, temperature = self.config.ppo, self.sampling.temperature
        if ppo.kl.estimator == "exact":
            logprobs, ref_logprobs, kl = self.policy.against(self.reference, rollouts, temperature)
            return _Held(ref_logprobs, kl, logprobs)
        asked = trained and ppo.old_logprobs == "training"
        own = self.policy.logprobs(rollouts, temperature) if asked else None
        return _Held(self.reference.logprobs(rollouts, temperature), None, own)

    def as_trained(self, rollouts: Rollouts, trained: Tensor | None) -> tuple[Rollouts, Tensor | None]:
        """With `old_logprobs: training` the ratio is against these; and the weights that make up for it, or None."""
        ppo = self.config.ppo
        if ppo.old_logprobs == "rollout" or trained is None:
            return rollouts, None
        weights = None
        if ppo.importance_cap is not None:
            weights = importance_weights(trained, rollouts.logprobs, rollouts.mask, ppo.importance_cap)
        return dataclasses.replace(rollouts, logprobs=trained), weights

    def policy_loss(self, policy: CausalModel, batch: Episodes, count: Tensor, gap: LogprobGap | None = None) -> Loss:
        """The clipped surrogate on a micro-batch; `count`: response tokens of the global minibatch."""
        # Both log-probs are of the whole softmax, whatever top_k and top_p left to draw from: the ratio starts at 1.
        ppo = self.config.ppo
        logprobs, entropy = policy.response_logprobs(batch, self.sampling.temperature, entropy=True)
        assert entropy is not None
        if gap is not None:
            gap.see(logprobs, batch.logprobs, batch.mask)
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

    def logprob_gap(self) -> LogprobGap:
        """To be shown some tokens of this iteration."""
        limit = self.config.rollout.gap_limit("fp32" if self.policy.dtype == torch.float32 else "bf16")
        return LogprobGap(self.world, self.policy.dtype, limit)

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
        return limit is None or found.get("validation/kl", 0.0) <= limit

    def save(self, folder: str) -> None:
        """`folder`/model, of the averaged weights where they are kept. Collective."""
        with watchdog.phase("saving the model"), self.policy.averaged():
            save_policy(self.policy, folder, self.config.policy, self.data.tokenizer)

    def validate(self) -> dict[str, float]:
        """Scores on held-out prompts and KL there, loss on held-out pretraining text: of the averaged weights, where
        `ppo.ema` keeps them. Collective."""
        with watchdog.phase("validation"), self.policy.averaged():
            return self._validate()

    def _validate(self) -> dict[str, float]:
        found = {}
        if self.data.held_out_text:
            sums = evaluate(self.policy, language_loss, self.data.held_out_text, collate_text)
            found["loss/pretraining_heldout"] = float(sums["loss"])
        rows = self.data.held_out_prompts
        if rows:
            measures = self.reward_model.score, self.kl_of
            means = mean_over_prompts(self.policy, rows, self.sampling, self.world, *measures)
            found[SCORE], found["validation/kl"] = means
        return found

    def kl_of(self, answers: Rollouts) -> Tensor:
        """KL to the reference [B], nats per answer: exact, or of the sampled tokens, as `ppo.kl.estimator` says."""
        held = self.held_against_reference(answers, trained=False)
        return (((answers.logprobs - held.ref_logprobs) if held.kl is None else held.kl) * answers.mask).sum(1)


@dataclass
class _Held:
    """`ref_logprobs [B, L]`; with the exact estimator `kl [B, L]` to the reference; `trained [B, L]`: the policy's
    log-probs by its training forward, where something asks for them."""

    ref_logprobs: Tensor
    kl: Tensor | None
    trained: Tensor | None


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
    with watchdog.watching(world, config.run.hang_seconds), saver.running():
        for number in range(saver.done + 1, iterations + 1):
            before = run.validate() if number == 1 and every > 1 else {}
            with spans.step(number):
                metrics = run.iteration(number)
            found: dict[str, float] = {}
            ends = number == iterations or run.is_spent(metrics)
            if ends or (every and number % every == 0):
                found = run.validate()
            report.log(number, metrics | before | found)
            score = found.get(SCORE) if run.near_reference(found) else None
            if score is not None and every:  # of one validation alone, at the end, the best model is the last
                best.offer(number, score)
            saver.after(number, score)
            if ends:
                break
        saver.close()
        run.save(config.run.folder)
    if run.critic is not None:
        run.critic.save_pretrained(f"{config.run.folder}/critic", data.tokenizer)
