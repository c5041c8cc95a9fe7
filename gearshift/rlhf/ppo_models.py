"""The models of a PPO run, and how they are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gearshift.engine import (
    CausalModel,
    HybridEngine,
    RewardModel,
    Training,
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
    frozen,
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
    common = common_of(config, world)
    policy = load_policy(config, world, common)
    return Models(
        policy,
        _critic(config, world, common) if config.has_critic else None,
        load_reference(config, world, policy, frozen(common)),
        load_reward(config.reward, data.asked, world, **frozen(common)),
    )


def common_of(config: PpoConfig, world: World) -> dict[str, Any]:
    """How every model of a run is loaded."""
    return {
        "dtype": dtype_of(config.run, world),
        "micro_batch_size": config.ppo.micro_batch_size,
        "micro_batch_tokens": config.ppo.micro_batch_tokens,
        "deepspeed_extra": config.deepspeed,
    }


def schedule_of_ppo(config: PpoConfig) -> Schedule:
    """The factor of the rates of policy and critic by optimizer step."""
    ppo = config.ppo
    return constant(ppo.warmup_iterations * ppo.minibatches * ppo.epochs, first=ppo.warmup_from)


def load_policy(config: PpoConfig, world: World, common: dict[str, Any], shape: Any = None) -> HybridEngine:
    """`shape`: the `transformers` config of a policy that is not read from a folder (`policy.init` "config")."""
    return HybridEngine.load(
        config.policy.init,
        world,
        training=training_of(config.optimizer, schedule_of_ppo(config), average=config.ppo.ema),
        config=shape,
        lora=config.policy.lora,
        **rollout_of(config.rollout),
        **common,
    )


def _critic(config: PpoConfig, world: World, common: dict[str, Any]) -> RewardModel:
    """A copy of the reward model, or a model of its own, which gets a new value head where it has none."""
    init = config.reward.init if config.critic_is_reward else config.critic.init
    return RewardModel.load(
        init,
        world,
        training=critic_training(config),
        new_head=lacks_value_head(init),
        seed=config.run.seed,
        **common,
    )


def critic_training(config: PpoConfig) -> Training:
    """How the critic's weights move."""
    return training_of(config.optimizer, schedule_of_ppo(config), config.critic.learning_rate)


def load_reference(
    config: PpoConfig, world: World, policy: CausalModel, common: dict[str, Any], shape: Any = None
) -> CausalModel | WithoutAdapters:
    """The policy as it starts (with adapters: the policy with them off, no second copy), or a model of its own.

    `shape`: as in `load_policy`.
    """
    if config.reference.init == "policy" and config.policy.lora is not None:
        return policy.without_adapters()
    init = config.policy.init if config.reference.init == "policy" else config.reference.init
    return CausalModel.load(init, world, config=shape, **offloaded(common, config.reference.offload))
