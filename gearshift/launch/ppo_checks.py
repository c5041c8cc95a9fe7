"""The settings of PPO against each other and the rank count, before any process starts."""

from __future__ import annotations

import math

from gearshift.errors import SettingError
from gearshift.launch.model_checks import numbers
from gearshift.rlhf.ppo_settings import KlSettings, PpoSettings
from gearshift.rlhf.settings import BenchConfig, CriticSettings, PpoConfig


def check_ppo(config: PpoConfig, ranks: int) -> None:
    """Raises SettingError for what does not divide, would not be read, or lacks what it needs."""
    _check_ppo_batches(config, ranks)
    _check_adaptive_kl(config)
    _check_advantage(config)
    _check_average(config)
    _check_best(config)
    _check_ptx(config)
    _check_offload(config)
    _check_profile(config)


def divides(field: str, value: int, divisor: int, what: str, step: int | None = None) -> None:
    """`value` splits into `divisor` equal parts; the values named as right are multiples of `step`."""
    if value % divisor == 0:
        return
    step = step or divisor
    below = value // step * step
    near = f"{below} or {below + step}" if below else f"{step}"
    raise SettingError(field, f"{value} does not divide by {what}: use {near}")


def _check_ppo_batches(config: PpoConfig, ranks: int) -> None:
    ppo = config.ppo
    step = ppo.minibatches * ranks
    divides("ppo.batch_size", ppo.batch_size, ranks, f"the {ranks} ranks (run.ranks)", step)
    divides("ppo.batch_size", ppo.batch_size, ppo.minibatches, f"ppo.minibatches = {ppo.minibatches}", step)
    divides("ppo.batch_size", ppo.batch_size, ppo.answers, f"ppo.answers = {ppo.answers}", math.lcm(step, ppo.answers))
    if ppo.minibatch_size % ranks:
        fitting = numbers(m for m in range(1, ppo.batch_size // ranks + 1) if ppo.batch_size // ranks % m == 0)
        raise SettingError(
            "ppo.minibatches",
            f"{ppo.minibatches} makes minibatches of {ppo.minibatch_size} episodes (of ppo.batch_size = "
            f"{ppo.batch_size}), which do not divide by the {ranks} ranks (run.ranks): use {fitting}",
        )
    if not isinstance(config, BenchConfig):  # which runs as many iterations as it is told to
        divides("ppo.episodes", ppo.episodes, ppo.batch_size, f"ppo.batch_size = {ppo.batch_size}")


def _check_profile(config: PpoConfig) -> None:
    profile, iterations = config.run.profile, config.ppo.iterations
    if profile.iterations and profile.after + profile.iterations > iterations:
        fewer = "run.profile.after: 0 or " if profile.iterations <= iterations else ""
        raise SettingError(
            "run.profile",
            f"{profile.iterations} to profile after {profile.after} (run.profile.after), but the run has "
            f"{'1 iteration' if iterations == 1 else f'{iterations} iterations'}: use {fewer}more ppo.episodes",
        )


def _check_adaptive_kl(config: PpoConfig) -> None:
    kl, episodes = config.ppo.kl, config.ppo.batch_size
    if kl.target is None:
        for name in ("horizon", "clamp"):
            if getattr(kl, name) != getattr(KlSettings(), name):
                raise SettingError(
                    f"ppo.kl.{name}", "only with ppo.kl.target, without which ppo.kl.coef stays: leave it out"
                )
        return
    if kl.coef == 0:
        raise SettingError("ppo.kl.coef", "0 times anything stays 0, so ppo.kl.target would do nothing: start at 0.02")
    # The largest step down multiplies by 1 - clamp batch_size / horizon, which must stay above 0.
    if kl.horizon <= kl.clamp * episodes:
        raise SettingError(
            "ppo.kl.horizon",
            f"{kl.horizon} is so short that one iteration of ppo.batch_size = {episodes} can take ppo.kl.coef to 0 for "
            f"ever: use at least {math.floor(kl.clamp * episodes) + 1}, better several times ppo.batch_size "
            "(Ziegler et al.: 10000)",
        )


def _check_advantage(config: PpoConfig) -> None:
    """What needs a critic, or a group of answers, or the training forward's log-probs, has it."""
    ppo = config.ppo
    group = ppo.advantage != "gae"
    untouched = PpoSettings()
    for wrong, field, problem in (
        (
            group and ppo.answers < 2,
            "ppo.answers",
            f"ppo.advantage: {ppo.advantage} compares the answers to a prompt: set 2 or more, not {ppo.answers}",
        ),
        *(
            (
                group and getattr(ppo, name) != getattr(untouched, name),
                f"ppo.{name}",
                f"ppo.advantage: {ppo.advantage} has no critic, so it would not be read: leave it out",
            )
            for name in ("lam", "gamma", "value_clip", "critic_iterations", "whiten_rewards", "whiten")
        ),
        (
            group and config.critic != CriticSettings(),
            "critic",
            f"ppo.advantage: {ppo.advantage} has no critic: leave the section out",
        ),
        (
            ppo.kl.where == "loss" and ppo.kl.estimator not in ("k2", "k3"),
            "ppo.kl.estimator",
            f"{ppo.kl.estimator} is no penalty in a loss (ppo.kl.where: loss): use k3 or k2",
        ),
        (
            ppo.importance_cap is not None and ppo.old_logprobs != "training",
            "ppo.importance_cap",
            "weighs the training forward's log-probs against the rollout's: set ppo.old_logprobs: training",
        ),
        (
            ppo.critic_iterations >= ppo.iterations,
            "ppo.critic_iterations",
            f"{ppo.critic_iterations} leaves none of the {ppo.iterations} iterations for the policy",
        ),
    ):
        if wrong:
            raise SettingError(field, problem)


def _check_average(config: PpoConfig) -> None:
    """The average is kept beside the fp32 weights, which must be in memory."""
    zero = config.deepspeed.get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, dict) else None
    if config.ppo.ema is not None and isinstance(offload, dict) and offload.get("device") == "nvme":
        raise SettingError("ppo.ema", "needs the optimizer's weights in memory, not on NVMe: set it to null")


def _check_best(config: PpoConfig) -> None:
    if config.ppo.best_kl is not None and not config.data.validation:
        raise SettingError("ppo.best_kl", "needs validation: set data.validation and ppo.validate_every")


def _check_ptx(config: PpoConfig) -> None:
    if config.ptx.weight > 0 and not config.ptx.data:
        raise SettingError("ptx.data", "needed with ptx.coef above 0: sources of pretraining text")
    if config.ptx.data and config.ptx.weight == 0:
        raise SettingError(
            "ptx.data", "with ptx.coef 0 this is plain PPO: leave ptx.coef out (27.8, as InstructGPT's), or ptx.data"
        )


def _check_offload(config: PpoConfig) -> None:
    if config.reference.offload and config.reference.init == "policy" and config.policy.lora is not None:
        raise SettingError(
            "reference.offload",
            "with policy.lora the reference is the policy without its adapters, no second copy: leave it out",
        )
