"""The models of a PPO run, and how they are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gearshift.engine import (
    CausalModel,
    HybridEngine,
    RewardModel,
    World,
)
from gearshift.engine.causal import WithoutAdapters
from gearshift.engine.zero import Schedule
from gearshift.rlhf.ppo_data import PpoData
from gearshift.rlhf.rewards import Reward, load_reward
from gearshift.rlhf.schedules import constant
from gearshift.rlhf.settings import PpoConfig
from gearshift.rlhf.setup import (
    dtype_of,
    lacks_value_head,
    offloaded,
    rollout_of,
    training_of,
)


@dataclass
class Models:
    """The models of PPO. `reference` and `reward_model` are frozen; without GAE there is no critic."""

    policy: HybridEngine
    critic: RewardModel | None
    reference: CausalModel | WithoutAdapters
    reward_model: Reward


def load_models(config: PpoConfig, world: World, data: PpoData) -> Models:
    """Policy and critic that train, reference and reward model that do not."""
    ppo, dtype = config.ppo, dtype_of(config.run, world)
    steps_per_iteration = ppo.minibatches * ppo.epochs
    schedule = constant(ppo.warmup_iterations * steps_per_iteration, first=ppo.warmup_from)
    common: dict[str, Any] = {
        "dtype": dtype,
        "micro_batch_size": ppo.micro_batch_size,
        "micro_batch_tokens": ppo.micro_batch_tokens,
        "deepspeed_extra": config.deepspeed,
    }
    policy = HybridEngine.load(
        config.policy.init,
        world,
        training=training_of(config.optimizer, schedule, average=ppo.ema),
        lora=config.policy.lora,
        **rollout_of(config.rollout),
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
    if config.reference.init == "policy" and config.policy.lora is not None:
        return policy.without_adapters()
    init = config.policy.init if config.reference.init == "policy" else config.reference.init
    return CausalModel.load(init, world, **offloaded(common, config.reference.offload))
