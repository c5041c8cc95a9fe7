"""What a rank holds of a model as long as the run goes, or as long as the model trains."""

from __future__ import annotations

from dataclasses import dataclass

from gearshift.launch.planner.models import PaperModel
from gearshift.launch.planner.passes import Sharding

FP32 = 4


@dataclass(frozen=True)
class Holding:
    """Bytes on a rank's device, and `host` those in its host's memory in their place.

    `weights`: the shards; `whole`: the small parameters that ZeRO-3 keeps so; `gradients`: those summed so far, in
    fp32; `optimizer`: fp32 weights, where the shards are not in fp32 themselves, and moments; `average`: the fp32
    moving average of the weights; `bucket`: the buffer in which gradients are collected. `passing`: gradients and
    buffer are there while the model trains, and not in between.
    """

    weights: int = 0
    whole: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    bucket: int = 0
    host: int = 0
    passing: bool = False

    @property
    def total(self) -> int:
        return self.weights + self.whole + self.gradients + self.optimizer + self.average + self.bucket


def holding(model: PaperModel, sharding: Sharding, moments: int, average: bool) -> Holding:
    """Of one model. `moments`: numbers that the optimizer keeps for a weight beside it (AdamW: 2)."""
    n, size, zero, shard = sharding.ranks, sharding.itemsize, sharding.zero, sharding.shard
    small = [p.numel() for p in model.parameters if p.numel() <= zero.persistence]
    shards = sum(shard(p.numel()) for p in model.parameters) * size
    kept_whole = sum(shard(numel) * n for numel in small) * size if n > 1 else 0
    on_device = sum(map(shard, small)) * size if zero.offload_param and not model.trained else 0
    weights = on_device if zero.offload_param else shards
    host = shards - weights
    if not model.trained:
        return Holding(weights, kept_whole, host=host)
    trained = trained_shard(model, sharding)
    masters = trained if size < FP32 or zero.offload_optimizer else 0
    state = (masters + moments * trained) * FP32
    averaged = trained * FP32 if average else 0
    bucket, passing = zero.reduce_bucket * FP32, adds_up(model, sharding)
    if passing:
        bucket = 0 if n == 1 else n * trained * FP32
    if zero.offload_optimizer:
        host += state + averaged + 2 * trained * FP32
        return Holding(weights, kept_whole, bucket=bucket, host=host)
    return Holding(weights, kept_whole, trained * FP32, state, averaged, bucket, host, passing)


def trained_shard(model: PaperModel, sharding: Sharding) -> int:
    """Elements that a rank has of the parameters that train."""
    return sum(sharding.shard(p.numel()) for p in model.parameters if p.requires_grad)


def adds_up(model: PaperModel, sharding: Sharding) -> bool:
    """Whether `engine.gradients` adds up the model's gradients, or DeepSpeed reduces each on its way."""
    n, zero = sharding.ranks, sharding.zero
    return not zero.offload_optimizer and (n == 1 or n * trained_shard(model, sharding) <= zero.reduce_bucket)


def step_bytes(model: PaperModel, sharding: Sharding) -> int:
    """Bytes that an optimizer step takes for a while on the device: where gradients do not lie in a flat buffer
    already, a flat copy of those of one group of parameters at a time."""
    if sharding.zero.offload_optimizer or adds_up(model, sharding):
        return 0
    largest = group = 0
    for parameter in model.parameters:
        group += sharding.shard(parameter.numel()) if parameter.requires_grad else 0
        largest = max(largest, group)
        group = 0 if group >= sharding.zero.sub_group else group
    return largest * FP32
