"""The shift on two ranks, from every way in which ZeRO-3 keeps weights, and what it leaves in memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gearshift.engine import HybridEngine, Sampling, Training, World
from gearshift.engine.sharded import zero_shards
from tests.engine.test_hybrid import nll, replica_is_gathered, some_prompts
from tests.models import save_tiny
from tests.worker_group import WorkerGroup

CUT_ALL = {"stage3_param_persistence_threshold": 0}  # nothing is kept whole, as in a model of more than toy size


def policy_of(
    world: World, folder: str, zero: dict[str, Any] | None = None, optimizer: str = "adamw", **more: Any
) -> HybridEngine:
    return HybridEngine.load(
        folder,
        world,
        micro_batch_size=4,
        training=Training(learning_rate=1e-2, optimizer=optimizer),
        deepspeed_extra={"zero_optimization": CUT_ALL | (zero or {})},
        **{"dtype": torch.float32, "tp_size": world.size} | more,
    )


def train(policy: HybridEngine, seed: int = 0) -> None:
    """One step on what the policy itself writes."""
    mine = some_prompts(6, seed).select(policy.world.share(6))
    with policy.rollout() as generator:
        rollouts = generator.generate(mine, Sampling(4, eos_ids=(2,), seed=seed))
    policy.accumulate(nll, rollouts)
    policy.step()


@contextmanager
def counted_wire() -> Iterator[list[int]]:
    """Bytes that come out of every exchange of a shift, from other ranks."""
    import gearshift.engine.shift as module

    own, counts = module.dist.all_to_all_single, []

    def counting(output: Tensor, source: Tensor, received: list[int], sent: list[int], **more: Any) -> Any:
        assert output.element_size() == source.element_size() == 1
        assert len(output) == sum(received)
        counts.append(len(output))
        return own(output, source, received, sent, **more)

    module.dist.all_to_all_single = counting
    try:
        yield counts
    finally:
        module.dist.all_to_all_single = own


def train_and_shift(policy: HybridEngine) -> dict[str, Any]:
    """Three steps, a shift before each and after the last: what it brought, and what it left of the shards."""
    found: dict[str, Any] = {"same": [], "untouched": [], "bytes": [], "moved": []}
    for turn in range(4):
        before = [p.ds_tensor.clone() for p in policy.module.parameters()]
        with counted_wire() as wire, policy.rollout():
            after = [p.ds_tensor for p in policy.module.parameters()]
            found["untouched"].append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
            found["same"].append(replica_is_gathered(policy))
        assert policy._shift is not None
        bound = policy._shift.plan.traffic().received[policy.world.rank] * policy.dtype.itemsize
        found["bytes"].append((sum(wire), policy.shift_bytes, int(bound)))
        if turn < 3:
            weights = [t.clone() for t in policy._replica.slices.values()]  # type: ignore[union-attr]
            train(policy, turn)
            with policy.rollout():
                new = policy._replica.slices.values()  # type: ignore[union-attr]
                found["moved"].append(sum(not torch.equal(a, b) for a, b in zip(weights, new, strict=True)))
                policy._replica.stamp = None  # type: ignore[union-attr]  # so that the next one shifts again
    return found


def variant(world: World, folder: str, zero: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return train_and_shift(policy_of(world, folder, zero, **more))


def of_two_groups(world: World, folder: str) -> dict[str, Any]:
    """The optimizer has matrices in one group, and all else in another with its own rate."""
    import gearshift.engine.zero as module

    own = module._optimizer

    def two_groups(training: Training, parameters: list[nn.Parameter], world: World) -> torch.optim.Optimizer:
        large = [p for p in parameters if len(p.ds_shape) > 1]
        small = [p for p in parameters if len(p.ds_shape) == 1]
        groups = [{"params": large, "weight_decay": 0.1}, {"params": small, "lr": 1e-3}]
        return torch.optim.AdamW(groups, lr=training.learning_rate)

    module._optimizer = two_groups
    try:
        policy = policy_of(world, folder)
    finally:
        module._optimizer = own
    assert len(policy.engine.optimizer.fp16_groups) == 2
    return train_and_shift(policy)


def partly_frozen(world: World, folder: str, on_host: bool) -> dict[str, Any]:
    """Only the attention learns: what is frozen is in none of DeepSpeed's flat buffers."""
    from transformers import AutoModelForCausalLM

    from gearshift.engine.heads import bind_logprob_head
    from gearshift.engine.loading import load_module

    extra = {"zero_optimization": CUT_ALL | ({"offload_param": {"device": "cpu"}} if on_host else {})}
    module = load_module(AutoModelForCausalLM, folder, world, torch.float32, deepspeed_extra=extra)
    bind_logprob_head(module)

    def only_attention(trained: bool) -> None:
        for name, parameter in module.named_parameters():
            parameter.requires_grad = trained and "self_attn" in name

    module.requires_grad_ = only_attention
    policy = HybridEngine(
        module, world, training=Training(1e-2), micro_batch_size=4, deepspeed_extra=extra, tp_size=world.size
    )
    found = train_and_shift(policy)
    trained = sum(p.requires_grad for p in module.parameters())
    assert max(found["moved"]) == trained < len(list(module.parameters()))
    return found


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all cut": ({}, {}),
    "all kept whole": ({"stage3_param_persistence_threshold": 10**5}, {}),
    "small ones kept whole": ({"stage3_param_persistence_threshold": 100}, {}),
    "on the host": ({"offload_param": {"device": "cpu"}}, {}),
    "on the host, small ones kept": (
        {"offload_param": {"device": "cpu", "pin_memory": True}, "stage3_param_persistence_threshold": 100}, {}
    ),
    "with the optimizer on the host": (
        {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}, {}
    ),
    "in sub-groups": ({"sub_group_size": 3000}, {}),
    "bf16 with fp32 masters": ({}, {"dtype": torch.bfloat16}),
    "whole replicas": ({}, {"tp_size": 1}),
    "with sgd": ({}, {"optimizer": "sgd"}),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_the_replica_has_the_newest_weights(two_ranks: WorkerGroup, tmp_path: Path, name: str) -> None:
    """Bit for bit those that DeepSpeed gathers; the shards as they were; over the wire what was lacking, no more."""
    zero, more = VARIANTS[name]
    folder = str(save_tiny("qwen2", tmp_path / "qwen2"))
    for found in two_ranks.run(variant, folder, zero, more):
        _check(found)
        travels = name != "all kept whole"
        assert all((wire > 0) == travels for wire, _, _ in found["bytes"])


def _check(found: dict[str, Any]) -> None:
    assert found["same"] == [True] * 4
    assert found["untouched"] == [True] * 4
    assert all(wire == told == bound for wire, told, bound in found["bytes"])
    assert min(found["moved"]) > 0


def test_of_an_optimizer_of_two_groups(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    for found in two_ranks.run(of_two_groups, str(save_tiny("llama", tmp_path / "llama"))):
        _check(found)


@pytest.mark.parametrize("on_host", [False, True])
def test_of_a_model_that_is_partly_frozen(two_ranks: WorkerGroup, tmp_path: Path, on_host: bool) -> None:
    for found in two_ranks.run(partly_frozen, str(save_tiny("llama", tmp_path / "llama")), on_host):
        _check(found)


# --- memory ----------------------------------------------------------------------------------------------------------


def alternate(world: World, folder: str, tp_size: int, times: int) -> dict[str, Any]:
    """Rollouts and training steps in turn; the bytes that tensors hold after two turns and at the end."""
    policy = policy_of(world, folder, tp_size=tp_size)
    mine = some_prompts(8).select(world.share(8))
    found: dict[str, Any] = {"gaps": [], "untouched": [], "same": [], "bytes": []}
    for turn in range(times):
        before = [p.ds_tensor.clone() for p in policy.module.parameters()]
        with policy.rollout() as generator:
            rollouts = generator.generate(mine, Sampling(8, eos_ids=(2,), seed=turn))
            found["same"].append(replica_is_gathered(policy))
        after = (p.ds_tensor for p in policy.module.parameters())
        found["untouched"].append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        gap = (policy.logprobs(rollouts) - rollouts.logprobs) * rollouts.mask
        found["gaps"].append(gap.abs().max().item())
        policy.accumulate(nll, rollouts)
        policy.step()
        if turn in (1, times - 1):
            del rollouts, before, after, gap
            policy._replica.decoder.forget()  # type: ignore[union-attr]  # what recordings keep, they keep on purpose
            found["bytes"].append(live_bytes())
    return found


def check_alternation(found: dict[str, Any]) -> None:
    """Every shard as it was, every replica what DeepSpeed gathers, every log-prob the training forward's."""
    assert all(found["untouched"])
    assert all(found["same"])
    assert max(found["gaps"]) <= 1e-5
    early, late = found["bytes"]
    assert abs(late - early) < 1024  # scalars come and go; one kept row of a rollout would be more


@pytest.mark.parametrize(("family", "tp_size"), [("qwen2", 1), ("cohere", 2)])
def test_twenty_alternations_leave_nothing_behind(
    two_ranks: WorkerGroup, tmp_path: Path, family: str, tp_size: int
) -> None:
    folder = str(save_tiny(family, tmp_path / family))
    for found in two_ranks.run(alternate, folder, tp_size, 20):
        check_alternation(found)


def live_bytes() -> int:
    """All that tensors of this process hold, each storage once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), Tensor) and not found.is_meta:
            storage = found.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def buffers_of(world: World, folder: str, bucket_bytes: int) -> list[tuple[int, int]]:
    """Bytes that a shift takes for its buffers, and what the plan says of that: when made, released, used again."""
    from gearshift.engine.shift import Shift

    policy = policy_of(world, folder, bucket_bytes=bucket_bytes)
    with policy.rollout():
        pass
    plan, replica = policy._shift.plan, policy._replica  # type: ignore[union-attr]
    planned = plan.peak(world.rank) * policy.dtype.itemsize
    before = live_bytes()
    shift = Shift(plan, world, replica.slices)  # type: ignore[union-attr]
    found = [(live_bytes() - before, planned)]
    shift.buffers.release()
    found.append((live_bytes() - before, 0))
    shift.run(zero_shards(policy.module))
    found.append((live_bytes() - before, planned))
    return found


@pytest.mark.parametrize("bucket_bytes", [64 << 20, 8192, 1000])
def test_the_buffers_are_what_the_plan_says(two_ranks: WorkerGroup, tmp_path: Path, bucket_bytes: int) -> None:
    """Two of each, as large as the largest exchange; whatever the number of exchanges, nothing else."""
    for found in two_ranks.run(buffers_of, str(save_tiny("llama", tmp_path / "llama")), bucket_bytes):
        for measured, planned in found:
            assert measured == planned
        assert 0 < found[0][1] <= 4 * bucket_bytes


def in_turns(world: World, folder: str, keep_weights: bool) -> dict[str, Any]:
    """Addresses of all slices and live bytes within rollouts and between them; what each shift received."""
    policy = policy_of(world, folder, keep_weights=keep_weights)
    found: dict[str, Any] = {"addresses": [], "within": [], "between": [], "received": [], "allocation": []}
    for turn in range(5):
        with policy.rollout():
            found["addresses"].append([t.data_ptr() for t in policy._replica.slices.values()])  # type: ignore[union-attr]
            found["within"].append(live_bytes())
            found["allocation"].append(policy.allocation_seconds)
        assert not keep_weights or policy._replica.stamp == policy.stamp  # type: ignore[union-attr]
        found["between"].append(live_bytes())
        with policy.rollout():
            found["received"].append(policy.shift_bytes)
            assert replica_is_gathered(policy)
        train(policy, turn)
    found["weights"] = sum(t.nbytes for t in policy._replica.slices.values())  # type: ignore[union-attr]
    found["buffers"] = policy._shift.buffers.bytes  # type: ignore[union-attr]
    return found


def test_kept_weights_stay_where_they_are(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    """At the same addresses, which captured graphs hold; a second rollout of a step moves nothing."""
    for found in two_ranks.run(in_turns, str(save_tiny("llama", tmp_path / "llama")), True):
        assert all(addresses == found["addresses"][0] for addresses in found["addresses"])
        assert found["received"] == [0] * 5
        assert abs(found["within"][4] - found["between"][4]) < 1024


def test_weights_that_are_not_kept_are_freed(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    """The buffers too; a second rollout of a step has to shift again."""
    for found in two_ranks.run(in_turns, str(save_tiny("llama", tmp_path / "llama")), False):
        freed = [within - between for within, between in zip(found["within"], found["between"], strict=True)]
        assert all(abs(bytes - found["weights"] - found["buffers"]) < 1024 for bytes in freed)
        assert min(found["received"]) > 0
        assert min(found["allocation"][1:]) > 0
