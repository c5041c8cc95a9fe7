"""A PPO run on paper: what a rank of it holds in each phase of an iteration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from gearshift.engine.decoder import CudaGraphs
from gearshift.engine.layout import TensorParallelLayout
from gearshift.engine.reshard import ReshardPlan, Traffic
from gearshift.engine.zero import ALONE
from gearshift.errors import UserError
from gearshift.launch.planner import rollouts
from gearshift.launch.planner.holdings import Holding, adds_up, holding, step_bytes
from gearshift.launch.planner.models import GPU, Batch, PaperModel, causal, classifier
from gearshift.launch.planner.passes import Need, Sharding, need
from gearshift.launch.planner.rollouts import PaperReplica, Rollouts
from gearshift.launch.planner.tracing import Timeline
from gearshift.launch.planner.window import ZeroSettings
from gearshift.rlhf.settings import PpoConfig, names_function

# Bytes of an episode in the batch that every rank holds: nine fields of 4 or 8 bytes and a mask a response token, and
# the prompt's tokens.
EPISODE_TOKEN, EPISODE_PROMPT_TOKEN = 45, 8


@dataclass(frozen=True)
class Phase:
    """A part of an iteration; `parts`: bytes on a rank's device at its peak, by what they are."""

    name: str
    gear: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Shapes:
    """The `transformers` configs of a run's models; a reward that is a function has none."""

    policy: Any
    reward: Any
    critic: Any
    reference: Any


@dataclass
class PpoPlan:
    """`ranks` processes, `per_host` on each host; `graphs`: steps of decoding are recorded as CUDA graphs; `device`: of
    the kind that they compute on, which need not be there."""

    config: PpoConfig
    shapes: Shapes
    ranks: int
    per_host: int
    dtype: torch.dtype
    graphs: bool = True
    device: torch.device = GPU
    _models: dict[str, PaperModel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._models = self._models or _models(self.config, self.shapes, self.dtype, self.device)

    def changed(self, **sections: Mapping[str, Any]) -> PpoPlan:
        """The same with other values of some sections' fields; models are not built again."""
        updates = {name: getattr(self.config, name).model_copy(update=dict(v)) for name, v in sections.items()}
        found = replace(self, config=self.config.model_copy(update=updates))
        if found.config.rollout.tp_size == self.config.rollout.tp_size:
            found.replica, found.shift = self.replica, self.shift
        return found

    def with_deepspeed(self, section: dict[str, Any]) -> PpoPlan:
        """The same with another `deepspeed:` section."""
        found = replace(self, config=self.config.model_copy(update={"deepspeed": section}))
        found.replica = self.replica
        return found

    def splits(self, tp_size: int) -> bool:
        """Whether so many ranks can hold the policy together."""
        try:
            TensorParallelLayout.of(self._models["policy"].module, tp_size)
        except UserError:
            return False
        return True

    # --- what is asked of each rank ---------------------------------------------------------------------------------

    @cached_property
    def sharding(self) -> Sharding:
        return Sharding(self.ranks, self.dtype.itemsize, ZeroSettings.of(self.config.deepspeed))

    def sharding_of(self, name: str) -> Sharding:
        """Of one model: the config may ask for the weights of a frozen one to lie in host memory."""
        away = {"reference": self.config.reference.offload, "reward": self.config.reward.offload}
        if away.get(name):
            return replace(self.sharding, zero=replace(self.sharding.zero, offload_param=True))
        return self.sharding

    @property
    def models(self) -> Mapping[str, PaperModel]:
        """Those that have weights of their own."""
        return self._models

    @property
    def prompt(self) -> int:
        return self.config.data.max_prompt_tokens

    @property
    def response(self) -> int:
        return self.config.rollout.max_new_tokens

    @cached_property
    def rollouts(self) -> Rollouts:
        """What a tensor-parallel group answers."""
        rows = self.config.ppo.batch_size * self.config.rollout.tp_size // self.ranks
        return Rollouts(rows, min(rows, self.config.rollout.slots or rows), self.prompt, self.response)

    def batch(self, rows: int, times: int = 1) -> Batch:
        """The largest micro-batch of episodes, of `rows` on this rank."""
        length = self.prompt + self.response
        return Batch(self.micro(rows, length, times), length, self.response)

    def micro(self, rows: int, length: int, times: int = 1) -> int:
        """Of `rows` rows of `length` tokens, how many share a micro-batch, or one that is `times` as large."""
        size, tokens = self.config.ppo.micro_batch_size, self.config.ppo.micro_batch_tokens
        return min(rows, times * size if tokens is None else max(1, times * tokens // length))

    @cached_property
    def scored(self) -> Batch:
        return self.batch(self.config.ppo.batch_size // self.ranks, ALONE)

    @cached_property
    def updated(self) -> Batch:
        return self.batch(self.config.ppo.minibatch_size // self.ranks)

    @cached_property
    def text(self) -> Batch | None:
        """The largest micro-batch of pretraining text."""
        ptx = self.config.ptx
        if ptx.weight == 0:
            return None
        rows = self.config.ppo.minibatch_size * ptx.examples_per_episode // self.ranks
        return Batch(self.micro(rows, ptx.max_tokens), ptx.max_tokens, ptx.max_tokens - 1)

    # --- what is always there ---------------------------------------------------------------------------------------

    @property
    def moments(self) -> int:
        return 2 if self.config.optimizer.name == "adamw" else 0

    @cached_property
    def holdings(self) -> dict[str, Holding]:
        average = self.config.ppo.ema is not None
        return {
            name: holding(model, self.sharding_of(name), self.moments, average and name == "policy")
            for name, model in self._models.items()
        }

    @property
    def host_bytes(self) -> int:
        """Host memory of a rank for what is offloaded."""
        away = sum(held.host for held in self.holdings.values())
        if self.config.rollout.offload_optimizer:
            away += self.holdings["policy"].optimizer + self.holdings["policy"].average
        return away

    @cached_property
    def replica(self) -> PaperReplica:
        return PaperReplica(self.shapes.policy, self.config.rollout.tp_size, self.dtype)

    @cached_property
    def shift(self) -> ReshardPlan:
        bucket = self.config.rollout.bucket_mb << 20
        return self.replica.plan(self.ranks, self.per_host, bucket, self.sharding.zero.persistence)

    @cached_property
    def traffic(self) -> Traffic:
        return self.shift.traffic()

    @cached_property
    def buffers(self) -> int:
        """Of the shift, on the rank that has the most."""
        return max(self.shift.peak(rank) for rank in range(self.ranks)) * self.dtype.itemsize

    @cached_property
    def cache(self) -> int:
        """Bytes of keys and values."""
        block = CudaGraphs.block if self._records else 1
        return self.replica.cache(self.rollouts.slots, self.prompt + self.response, block)

    @property
    def _records(self) -> bool:
        return self.graphs and self.config.rollout.record_steps

    @cached_property
    def episodes(self) -> int:
        """Bytes of an iteration's episodes, which every rank holds."""
        row = EPISODE_TOKEN * self.response + EPISODE_PROMPT_TOKEN * self.prompt
        return self.config.ppo.batch_size * row

    # --- phases -----------------------------------------------------------------------------------------------------

    @cached_property
    def phases(self) -> list[Phase]:
        """In the order of an iteration."""
        return [self.rollout, *self._scoring(), *self._training()]

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def rollout_weights(self) -> int:
        """Bytes of the slices that a rollout reads: on one rank those of ZeRO-3, where they are what it needs."""
        in_place = self.ranks == 1 and self.config.policy.lora is None and not self.sharding.zero.offload_param
        return 0 if in_place else self.replica.weights

    def _base(self) -> dict[str, int]:
        """What is there in every phase."""
        held = self.holdings.values()
        keeps = self.config.rollout.keep_weights
        cache = self.cache if rollouts.cache_is_kept(self.cache, keeps, self._records) else 0
        return {
            "weights": sum(h.weights + h.whole for h in held),
            "gradients": sum(0 if h.passing else h.gradients for h in held),
            "optimizer": sum(h.optimizer + h.average for h in held),
            "buckets": sum(0 if h.passing else h.bucket for h in held) + (self.buffers if keeps else 0),
            "rollout weights": self.rollout_weights if keeps else 0,
            "KV cache": cache,
            "gathered": 0,
            "activations": 0,
            "episodes": self.episodes,
        }

    @cached_property
    def rollout(self) -> Phase:
        """The first of them."""
        parts, asked, policy = self._base(), self.rollouts, self.holdings["policy"]
        if self.config.rollout.offload_optimizer:
            parts["optimizer"] -= policy.optimizer + policy.average
        if not self.config.rollout.keep_weights:
            parts["buckets"] += self.buffers
        parts["rollout weights"], parts["KV cache"] = self.rollout_weights, self.cache
        truncated = self.config.rollout.top_k is not None or self.config.rollout.top_p < 1
        parts["episodes"] = rollouts.answer_bytes(asked.rows, asked.response)
        parts["activations"] = max(
            self.replica.prefill(asked),
            self.replica.draw(asked.slots, truncated),
            rollouts.merged_bytes(self._models["policy"], self.sharding) - self.cache,
        )
        return Phase("rollout", "tensor parallel", parts)

    def _scoring(self) -> list[Phase]:
        found = []
        if "reward" in self._models:
            found.append(self._forward("score: reward model", "reward"))
        found.append(self._forward("score: reference", "reference" if "reference" in self._models else "policy"))
        ppo = self.config.ppo
        if ppo.old_logprobs == "training" or ppo.kl.estimator == "exact":
            found.append(self._forward("score: policy", "policy"))
        if "critic" in self._models:
            found.append(self._forward("values: critic", "critic", self._alone("policy").left))
        return found

    def _training(self) -> list[Phase]:
        found = []
        for name in ("policy", "critic"):
            if name not in self._models:
                continue
            beside = self._alone("critic").left if name == "policy" and "critic" in self._models else 0
            held = self.holdings[name]
            # Over several ranks a shard of sums is there once they are reduced.
            shard = held.gradients if held.passing else 0
            first, bucket = (shard if self.ranks == 1 else 0), held.bucket if held.passing else 0
            found.append(self._backward(f"train: {name}", name, self.updated, beside, first, bucket))
            if name == "policy" and self.text is not None:
                title = "train: policy, pretraining text"
                found.append(self._backward(title, name, self.text, beside, shard, bucket))
            parts = self._base()
            parts["weights"] -= held.whole  # cut for as long as they change
            parts["gradients"] += shard
            parts["gathered"] += beside
            parts["gradients"] += step_bytes(self._models[name], self.sharding)
            found.append(Phase(f"step: {name}", "ZeRO-3", parts))
        return found

    def _trained(self, name: str, batch: Batch) -> Timeline:
        """A pass that trains a model."""
        return self._models[name].timeline(batch, True, self.config.optimizer.gradient_checkpointing)

    def _alone(self, name: str) -> Need:
        """Of a forward pass without a backward one."""
        model = self._models[name]
        training = self._trained(name, self.updated) if model.trained else None
        return need(model.timeline(self.scored, False), self.sharding_of(name), training)

    def _forward(self, title: str, name: str, beside: int = 0) -> Phase:
        return self._phase(title, self._alone(name), beside)

    def _backward(self, title: str, name: str, batch: Batch, beside: int, gradients: int, bucket: int) -> Phase:
        """`gradients`, `bucket`: bytes of those that come with the passes."""
        added = adds_up(self._models[name], self.sharding)
        found = self._phase(title, need(self._trained(name, batch), self.sharding, adds_up=added), beside)
        found.parts["gradients"] += gradients
        found.parts["buckets"] += bucket
        return found

    def _phase(self, title: str, found: Need, beside: int) -> Phase:
        parts = self._base()
        parts["gathered"] += found.gathered + beside
        parts["activations"] += found.activations
        parts["gradients"] += found.gradients
        return Phase(title, "ZeRO-3", parts)


def _models(config: PpoConfig, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> dict[str, PaperModel]:
    lora = config.policy.lora
    found = {"policy": causal(shapes.policy, dtype, True, lora, device)}
    if config.has_critic:
        found["critic"] = classifier(shapes.critic, dtype, True, device)
    if config.reference.init != "policy" or lora is None:
        found["reference"] = causal(shapes.reference, dtype, False, device=device)
    if not names_function(config.reward.init):
        found["reward"] = classifier(shapes.reward, dtype, False, device)
    return found
