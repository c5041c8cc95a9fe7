"""Config sections of PPO and PPO-ptx. No torch here.

Numbers are InstructGPT's (arXiv 2203.02155, appendix C.4) where it gives them. "N+" is "The N+ implementation details
of RLHF with PPO" (arXiv 2403.17031).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gearshift.engine.settings import Section, Sources


class KlSettings(Section):
    """The KL penalty in the reward, per token."""

    coef: float = Field(0.02, ge=0, description="Penalty per nat (InstructGPT C.4); the first one when target is set")
    estimator: Literal["k1", "k2", "k3", "exact"] = Field(
        "k1", description="Of the KL from sampled tokens (k1 is the log-ratio), or exact: over the whole vocabulary"
    )
    where: Literal["reward", "loss"] = Field(
        "reward",
        description="The penalty is part of each token's reward (InstructGPT), or a term of the policy loss "
        "(GRPO, arXiv 2402.03300, equation 3; with k2 or k3)",
    )
    target: float | None = Field(
        None,
        gt=0,
        description="KL per response that an adaptive coef aims at, nats (Ziegler et al. 2.2); null: fixed coef",
    )
    horizon: int = Field(10_000, ge=1, description="target: episodes over which coef adapts (Ziegler et al.: 10000)")
    clamp: float = Field(0.2, gt=0, lt=1, description="target: bound on the relative error (Ziegler et al.: 0.2)")


class ScoreSettings(Section):
    """From what the reward model says of an answer to what PPO is given, in this order. objective/scores is the
    former."""

    missing_eos_penalty: float = Field(
        0.0,
        ge=0,
        description="Subtracted from an answer cut off at the limit, reward units (N+: EOS trick); 0: none",
    )
    normalize: bool = Field(
        False, description="Mean 0, deviation 1, by the running moments of all scores of the run so far"
    )
    clip: float | None = Field(None, gt=0, description="Bound on a score's size, reward units; null: none")


class StopSettings(Section):
    """What ends an iteration's update, or the run, before its time. null: nothing does."""

    approx_kl: float | None = Field(
        None, gt=0, description="Skip the rest of an iteration's minibatches once policy/approxkl of one is above, nats"
    )
    entropy: float | None = Field(
        None, gt=0, description="End the run, saved, once an iteration's objective/entropy is below, nats per response"
    )


class PpoSettings(Section):
    """InstructGPT C.4, from the batch sizes to the clips."""

    episodes: int = Field(256_000, ge=1, description="Responses in the whole run, all ranks together (C.4)")
    batch_size: int = Field(512, ge=1, description="Episodes per iteration, all ranks together (C.4)")
    answers: int = Field(1, ge=1, description="Episodes of an iteration that answer the same prompt (C.4: 1)")
    minibatches: int = Field(8, ge=1, description="Optimizer steps that one pass over an iteration is cut into (C.4)")
    epochs: int = Field(1, ge=1, description="Passes over each iteration's episodes (C.4)")
    micro_batch_size: int = Field(
        8,
        ge=1,
        description="Rows per rank in one forward and backward (scoring takes twice as many); changes memory only",
    )
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens per rank in one forward and backward, in place of micro_batch_size; null: by rows",
    )
    clip: float = Field(0.2, gt=0, description="Bound on the probability ratio, 1 +- clip (C.4)")
    value_clip: float = Field(0.2, gt=0, description="Bound on a value's move from the rollout's, reward units (C.4)")
    dual_clip: float | None = Field(
        None,
        gt=1,
        description="Where the advantage is negative, bound on ratio x advantage (arXiv 1912.09729); null: none",
    )
    advantage: Literal["gae", "grpo", "rloo"] = Field(
        "gae",
        description="From the critic (GAE), or without one from the other answers to the prompt: grpo "
        "(arXiv 2402.03300, 4.1; the loss stays a mean over tokens), rloo (arXiv 2402.14740, 3.2); "
        "these need ppo.answers of 2 or more",
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount per token (C.4: none)")
    lam: float = Field(0.95, ge=0, le=1, description="Lambda of generalised advantage estimation (Stiennon et al.)")
    whiten: bool = Field(True, description="Advantages: mean 0, deviation 1 over the iteration's response tokens")
    whiten_rewards: bool = Field(
        False,
        description="Rewards: deviation 1 over the iteration's response tokens, the mean kept (N+)",
    )
    scores: ScoreSettings = Field(ScoreSettings(), description="What is done to scores before they are rewards")
    old_logprobs: Literal["rollout", "training"] = Field(
        "rollout",
        description="Log-probs of the policy that answered: as it sampled them, or computed again by the training "
        "forward (one forward more)",
    )
    importance_cap: float | None = Field(
        None,
        gt=0,
        description="old_logprobs: training: advantages times min(training / rollout probability, cap); null: off",
    )
    warmup_iterations: int = Field(10, ge=0, description="Iterations in which rates ramp up (C.4)")
    warmup_from: float = Field(0.1, gt=0, le=1, description="Part of the peak rate that the ramp starts at (C.4)")
    critic_iterations: int = Field(0, ge=0, description="First iterations, in which only the critic is updated")
    ema: float | None = Field(
        0.992,
        gt=0,
        lt=1,
        description="Decay per policy step of the average of the weights (C), which is validated, saved as model/ and "
        "exported; null: none",
    )
    stop: StopSettings = Field(StopSettings(), description="What ends an update or the run early")
    kl: KlSettings = Field(KlSettings(), description="Penalty for leaving the reference")
    validate_every: int = Field(0, ge=0, description="Iterations between validations; 0: only at the end")
    best_kl: float | None = Field(
        None, gt=0, description="best/ takes only policies whose validation KL per response is below, nats; null: any"
    )
    samples_every: int = Field(10, ge=0, description="Iterations between rows of samples.jsonl; 0: none")

    @property
    def iterations(self) -> int:
        """Rounds of rollout and update."""
        return self.episodes // self.batch_size

    @property
    def prompts(self) -> int:
        """Prompts drawn per iteration, all ranks together."""
        return self.batch_size // self.answers

    @property
    def minibatch_size(self) -> int:
        """Episodes per optimizer step, all ranks together."""
        return self.batch_size // self.minibatches


class PtxSettings(Section):
    """The pretraining loss that PPO-ptx mixes into each policy step."""

    coef: float | None = Field(
        None, ge=0, description="Weight of the pretraining loss; null: 27.8 (C.4) where there is ptx.data; 0: plain PPO"
    )
    data: Sources = Field([], description="Sources of pretraining text")
    validation: Sources = Field([], description="Sources of held-out text; its loss is what PPO costs")
    examples_per_episode: int = Field(8, ge=1, description="Pretraining sequences per episode of a minibatch (C.4)")
    max_tokens: int = Field(2048, ge=2, description="Length of a pretraining sequence, tokens")

    @property
    def weight(self) -> float:
        """The coefficient, the default included; 0: plain PPO."""
        if self.coef is not None:
            return self.coef
        return 27.8 if self.data else 0.0
