"""Weights that come and go in one piece, against DeepSpeed's hooks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import CausalModel, Training, World, gradients
from gearshift.engine import whole as pieces
from gearshift.engine.saving import gathered_parameters
from tests.engine.test_zero import ROWS, distance, episodes, language_loss, token_batch
from tests.models import save_tiny
from tests.worker_group import WorkerGroup

# Nothing is kept whole between steps, so that all of it comes and goes.
CUT = {"stage3_param_persistence_threshold": 0}
HOOKS = {"zero_optimization": CUT | {"stage3_prefetch_bucket_size": 10_000}}  # fewer than a model here has
WHOLE = {"zero_optimization": CUT}
SOME_KEPT = {"zero_optimization": {"stage3_param_persistence_threshold": 40}}  # the norms, between others in memory


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[WorkerGroup]:
    group = WorkerGroup(3)
    yield group
    group.stop()


def loaded(world: World, folder: str, extra: dict[str, Any], trains: bool = True) -> CausalModel:
    training = Training(learning_rate=0.01, max_grad_norm=0.5) if trains else None
    return CausalModel.load(
        folder, world, dtype=torch.float32, micro_batch_size=2, training=training, deepspeed_extra=extra
    )


def hooks_of(model: CausalModel) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.module.modules())


def there(model: CausalModel) -> set[str]:
    """Parameters that have their weights on this rank."""
    return {name for name, p in model.module.named_parameters() if p.numel()}


def what_it_computes(world: World, folder: str, extra: dict[str, Any], near: bool = True) -> dict[str, Any]:
    """Of two steps of several micro-batches each, and of a frozen model and its comparison with the trained one.
    `near`: ranks may share memory."""
    with pytest.MonkeyPatch.context() as patch:
        if not near:
            for module in (pieces, gradients):
                patch.setattr(module, "neighbours", lambda world: None)
        return _what_it_computes(world, folder, extra)


def _what_it_computes(world: World, folder: str, extra: dict[str, Any]) -> dict[str, Any]:
    model, frozen = loaded(world, folder, extra), loaded(world, folder, extra, trains=False)
    found: dict[str, Any] = {"hooks": (hooks_of(model), hooks_of(frozen)), "norms": [], "losses": []}
    found["near"] = None if model._whole is None else model._whole._runs[0]._near is not None
    for step in range(2):
        batch = token_batch(step).select(world.share(ROWS))
        found["losses"].append(float(model.accumulate(language_loss, batch)["loss"]))
        found["after"] = there(model)
        found["norms"].append(model.step())
    batch = token_batch(2).select(world.share(ROWS))
    found["losses"] += [float(m.evaluate(language_loss, batch)["loss"]) for m in (model, frozen)]
    found["against"] = [float(t.sum()) for t in model.against(frozen, episodes().select(world.share(ROWS)))]
    found["weights"] = {n: t.float() for n, t in gathered_parameters(model.module)}
    found["kept"] = {n for n, p in model.module.named_parameters() if p.ds_persist}
    return found


@pytest.mark.parametrize(("extra", "near"), [(WHOLE, True), (SOME_KEPT, True), (SOME_KEPT, False)])
def test_as_with_hooks(three_ranks: WorkerGroup, tmp_path: Path, extra: dict[str, Any], near: bool) -> None:
    """131 x 32 weights are not a multiple of three ranks."""
    folder = str(save_tiny("llama", tmp_path / "llama"))
    theirs = three_ranks.run(what_it_computes, folder, HOOKS)
    ours = three_ranks.run(what_it_computes, folder, extra, near)
    assert {found["near"] for found in ours} == {near}
    for with_hooks, without in zip(theirs, ours, strict=True):
        assert min(with_hooks["hooks"]) > 40
        assert without["hooks"] == (4, 4)  # two are those of DeepSpeed's engine
        assert without["losses"] == pytest.approx(with_hooks["losses"], rel=1e-6)
        assert without["norms"] == pytest.approx(with_hooks["norms"], rel=1e-5)
        assert without["against"] == pytest.approx(with_hooks["against"], rel=1e-5)
        assert distance(without["weights"], with_hooks["weights"]) <= 2e-6
        assert without["after"] == without["kept"]  # the others are gone
    assert len(ours[0]["kept"]) == (0 if extra is WHOLE else 5)


def collectives(world: World, folder: str, extra: dict[str, Any], at_once: int) -> tuple[int, float]:
    """How many a loss of three micro-batches needs for its weights, and the loss."""
    import torch.distributed as dist

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "neighbours", lambda world: None)
        model = loaded(world, folder, extra)
    count, own = 0, dist.all_gather_into_tensor
    assert model.packs  # is found out by forwards of its own

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        return own(*args, **more)

    before = pieces.AT_ONCE
    dist.all_gather_into_tensor, pieces.AT_ONCE = counted, at_once
    try:
        loss = model.accumulate(language_loss, token_batch().select(world.share(ROWS)))["loss"]
    finally:
        dist.all_gather_into_tensor, pieces.AT_ONCE = own, before
    return count, float(loss)


def test_once_for_all_micro_batches(three_ranks: WorkerGroup, tmp_path: Path) -> None:
    """Or in several parts, where the model is larger than one of them: they end within a weight."""
    folder = str(save_tiny("llama", tmp_path / "llama"))
    (one, loss), (several, other) = (three_ranks.run(collectives, folder, WHOLE, n)[0] for n in (1 << 23, 3 * 1000))
    parameters = 2 * 131 * 32 + 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48 + 2 * 32) + 32
    assert one == 1
    assert several == -(-parameters // 3000)
    assert loss == other


def forwards_alone(world: World, folder: str) -> dict[str, Any]:
    """What is there after a forward outside of everything."""
    model, frozen = loaded(world, folder, WHOLE), loaded(world, folder, WHOLE, trains=False)
    tokens = torch.arange(12).view(2, 6)
    found = {}
    frozen.hidden_states(tokens)
    found["frozen"] = there(frozen)
    with torch.no_grad():
        model.hidden_states(tokens)
    found["no backward"] = there(model)
    before = model.hidden_states(tokens)
    model.engine.backward(before.square().sum())
    found["backward"] = there(model)
    if model._sums is not None:
        model._sums.reduce()
    model.step()
    found["step"] = there(model)
    found["memory"] = sum(run._memory.bytes for run in model._whole._runs)  # type: ignore[union-attr]
    found["moved"] = float((model.hidden_states(tokens) - before).abs().max())
    return found


def test_a_forward_on_its_own(three_ranks: WorkerGroup, tmp_path: Path) -> None:
    """Weights leave where no backward can follow, and before they change."""
    folder = str(save_tiny("llama", tmp_path / "llama"))
    for found in three_ranks.run(forwards_alone, folder):
        assert found["frozen"] == found["no backward"] == found["step"] == set()
        assert found["memory"] == 0
        assert len(found["backward"]) == 21
        assert found["moved"] > 1e-3


def has_hooks(world: World, folder: str, extra: dict[str, Any]) -> bool:
    return hooks_of(loaded(world, folder, extra)) > 40


@pytest.mark.parametrize(
    "more",
    [
        {"offload_param": {"device": "cpu"}},
        {"stage3_prefetch_bucket_size": 23_903},  # one fewer than it has
    ],
)
def test_deepspeeds_hooks_stay(three_ranks: WorkerGroup, tmp_path: Path, more: dict[str, Any]) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama"))
    assert all(three_ranks.run(has_hooks, folder, {"zero_optimization": CUT | more}))


def in_groups(world: World, folder: str) -> list[bool]:
    """Whether weights come in one piece and gradients are summed where parameters are cut over fewer ranks than all."""
    model, larger = loaded(world, folder, WHOLE), replace(world, size=world.size + 1)
    ways = (
        pieces.WholeWeights.of(model.engine, larger),
        gradients.GradientSums.of(model.engine.optimizer, larger),
    )
    return [way is not None for way in ways]


def test_ranks_that_are_cut_into_groups_keep_deepspeeds_way(three_ranks: WorkerGroup, tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama"))
    assert three_ranks.run(in_groups, folder) == [[False, False]] * 3


def test_one_rank_has_none(one_rank: WorkerGroup, tmp_path: Path) -> None:
    """However large the model is: all of it is kept."""
    folder = str(save_tiny("llama", tmp_path / "llama"))
    assert not one_rank.run(has_hooks, folder, {"zero_optimization": {"stage3_prefetch_bucket_size": 0}})[0]
    assert one_rank.run(has_hooks, folder, {"zero_optimization": {"offload_param": {"device": "cpu"}}})[0]
