"""What fits into a GPU's memory: the largest micro-batch and slot count, and what to change when a plan does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gearshift.launch.planner.ppo import PpoPlan

SMALL_BUCKET = 50_000_000
IN_ROLLOUTS = "rollout.offload_optimizer"


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to `most` that fits, 0 if none; what is larger than one that does not fit does not."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def largest_micro_batch(plan: PpoPlan, memory: float) -> int:
    """The most rows a micro-batch may have, as far as a minibatch has rows; 0 where not even one fits."""
    rows = [plan.config.ppo.minibatch_size // plan.ranks]
    if plan.text is not None:
        rows.append(plan.config.ppo.minibatch_size * plan.config.ptx.examples_per_episode // plan.ranks)

    def fits(count: int) -> bool:
        return plan.changed(ppo={"micro_batch_size": count, "micro_batch_tokens": None}).largest.total <= memory

    return largest(max(rows), fits)


def asked_rows(plan: PpoPlan) -> int:
    """The rows of the longest episodes that a micro-batch may have, as the config has it."""
    return plan.micro(plan.config.ppo.batch_size, plan.prompt + plan.response)


def largest_slots(plan: PpoPlan, memory: float) -> int:
    """The most rows a tensor-parallel group may decode at once, as far as there are rows; 0 where not one fits."""
    return largest(plan.rollouts.rows, lambda n: plan.changed(rollout={"slots": n}).rollout.total <= memory)


@dataclass(frozen=True)
class Change:
    """A setting to change, and the peak with it and with those before it, in bytes."""

    field: str
    value: Any
    peak: int


def changes(plan: PpoPlan, memory: float) -> list[Change]:
    """Settings to change until the plan fits, those first that cost least time, and none that is not needed. The last
    one's peak may still be too much."""
    chosen = _chosen(plan, memory)
    if any(field == IN_ROLLOUTS for field, _ in chosen) and _peaks(plan, chosen)[-1] > memory:
        # It excludes the optimizer's being on the host at all times, which leaves more room.
        other = _chosen(plan, memory, without=IN_ROLLOUTS)
        if other and _peaks(plan, other)[-1] < _peaks(plan, chosen)[-1]:
            chosen = other
    for setting in list(chosen[:-1]):
        rest = [other for other in chosen if other != setting]
        if _peaks(plan, rest)[-1] <= memory:
            chosen = rest
    return [Change(*setting, peak) for setting, peak in zip(chosen, _peaks(plan, chosen), strict=True)]


def _chosen(plan: PpoPlan, memory: float, without: str = "") -> list[tuple[str, Any]]:
    """Each setting that lowers the peak, in their order, until it fits."""
    chosen: list[tuple[str, Any]] = []
    changed = plan
    for field, value_of in _candidates():
        if changed.largest.total <= memory:
            break
        if field == without:
            continue
        value = value_of(changed, memory)
        if value is not None:
            more = with_setting(changed, field, value)
            if more.largest.total < changed.largest.total:
                changed = more
                chosen.append((field, value))
    return chosen


def _peaks(plan: PpoPlan, settings: list[tuple[str, Any]]) -> list[int]:
    """The peak after each of the settings, one after the other."""
    found = []
    for field, value in settings:
        plan = with_setting(plan, field, value)
        found.append(plan.largest.total)
    return found


def with_setting(plan: PpoPlan, field: str, value: Any) -> PpoPlan:
    """The plan with one setting changed ("rollout.slots", or "deepspeed.zero_optimization.KEY")."""
    section, _, key = field.partition(".")
    if section == "deepspeed":
        zero = {**(plan.config.deepspeed.get("zero_optimization") or {}), key.partition(".")[2]: value}
        return plan.with_deepspeed({**plan.config.deepspeed, "zero_optimization": zero})
    return plan.changed(**{section: {key: value}})


Chooser = Callable[[PpoPlan, float], Any]


def _candidates() -> Iterator[tuple[str, Chooser]]:
    zero = "deepspeed.zero_optimization"

    def when(condition: Callable[[PpoPlan], bool], value: Any) -> Chooser:
        return lambda plan, memory: value if condition(plan) else None

    def group(size: int) -> Callable[[PpoPlan], bool]:
        return lambda p: p.config.rollout.tp_size < size <= p.per_host and p.ranks % size == 0 and p.splits(size)

    def frozen_here(name: str) -> Callable[[PpoPlan], bool]:
        return lambda p: name in p.models and not p.sharding_of(name).zero.offload_param

    def rows(plan: PpoPlan, memory: float) -> int | None:
        fitting = max(1, largest_micro_batch(plan, memory))
        return fitting if fitting < asked_rows(plan) else None

    def slots(plan: PpoPlan, memory: float) -> int | None:
        fitting = max(1, largest_slots(plan, memory))
        return fitting if plan.largest is plan.rollout and fitting < plan.rollouts.slots else None

    yield f"{zero}.reduce_bucket_size", when(lambda p: p.sharding.zero.reduce_bucket > SMALL_BUCKET, SMALL_BUCKET)
    yield "ppo.micro_batch_size", rows
    yield "rollout.slots", slots
    yield "rollout.keep_weights", when(lambda p: p.config.rollout.keep_weights, False)
    for size in (2, 4, 8):
        yield "rollout.tp_size", when(group(size), size)
    yield IN_ROLLOUTS, when(lambda p: _offloads(p) and p.largest is p.rollout, True)
    for name in ("reference", "reward"):
        yield f"{name}.offload", when(frozen_here(name), True)
    yield "optimizer.gradient_checkpointing", when(_keeps_activations, True)
    yield f"{zero}.offload_optimizer", when(_offloads, {"device": "cpu"})
    yield f"{zero}.offload_param", when(lambda p: not p.sharding.zero.offload_param, {"device": "cpu"})


def _keeps_activations(plan: PpoPlan) -> bool:
    """Whether activations are kept for the backward pass, and the models that train could compute them again."""
    can = all(m.module.supports_gradient_checkpointing for m in plan.models.values() if m.trained)
    return can and not plan.config.optimizer.gradient_checkpointing


def _offloads(plan: PpoPlan) -> bool:
    """Whether the optimizer's state is on the device and may leave it."""
    return not plan.sharding.zero.offload_optimizer and not plan.config.rollout.offload_optimizer
