"""Gradients that are added up on each rank and reduced once, against DeepSpeed's way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from gearshift.engine import CausalModel, TokenBatch, Training, World, adam, gradients
from gearshift.engine.memory import Scratch
from gearshift.engine.saving import gathered_parameters
from gearshift.engine.zero import on_host, zero3_config
from gearshift.kernels import Loss
from tests.engine.test_zero import ROWS, _gradient, distance, language_loss, token_batch
from tests.memory import resident_bytes
from tests.models import save_tiny
from tests.worker_group import WorkerGroup


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[WorkerGroup]:
    group = WorkerGroup(3)
    yield group
    group.stop()


BUCKET = {"zero_optimization": {"reduce_bucket_size": 3000}}  # holds no whole gradient of these models
GROUPS = {"zero_optimization": {"sub_group_size": 3000}}  # parameters are stepped in several groups


def two_steps(
    world: World, folder: str, extra: dict[str, Any], dtype: torch.dtype, clip: float = 0.5, optimizer: str = "adamw"
) -> dict[str, Any]:
    """Each of two losses in several micro-batches, as PPO-ptx has them."""
    training = Training(learning_rate=0.01, optimizer=optimizer, max_grad_norm=clip)
    model = CausalModel.load(folder, world, dtype=dtype, micro_batch_size=2, training=training, deepspeed_extra=extra)
    found: dict[str, Any] = {"adds_up": model._sums is not None, "gradients": [], "norms": []}
    found["direct"] = {n for n, p in model.module.named_parameters() if hasattr(p, "gradient_sum")}
    for step in range(2):
        for seed, weight in ((2 * step, 1.0), (2 * step + 1, 0.5)):
            model.accumulate(language_loss, token_batch(seed).select(world.share(ROWS)), weight)
        found["gradients"].append({n: _gradient(p) for n, p in model.module.named_parameters()})
        found["norms"].append(model.step())
    found["weights"] = {n: t.float() for n, t in gathered_parameters(model.module)}
    return found


# Matrices whose parts over three ranks are rows enough to be written by the product that they are: whole ones (192), or
# cut within a row (209 and 200). One of them is both the embedding and the head.
WIDE = {"vocab_size": 192, "intermediate_size": 192, "tie_word_embeddings": True}
CROSSED = {"vocab_size": 209, "intermediate_size": 200}
DIRECT = {
    "model.embed_tokens.weight",
    *(f"model.layers.{n}.mlp.{m}_proj.weight" for n in (0, 1) for m in ("gate", "up")),
}


@pytest.mark.parametrize("more", [{}, WIDE, CROSSED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_deepspeed_has_them(
    one_rank: WorkerGroup, three_ranks: WorkerGroup, tmp_path: Path, dtype: torch.dtype, more: Any
) -> None:
    """131 x 32 weights are not a multiple of three ranks. Not with Adam, which divides a gradient near 0 by its own
    size, and makes its rounding large."""
    folder = str(save_tiny("llama", tmp_path / "llama", **more))
    bound = 2e-6 if dtype == torch.float32 else 3e-2  # with other ranks other rows are rounded together
    theirs = three_ranks.run(two_steps, folder, BUCKET, dtype, 0.5, "sgd")[0]
    assert not theirs["adds_up"]
    assert not theirs["direct"]
    assert theirs["norms"][0] > 0.5  # so that it is clipped
    for group, extra in ((one_rank, {}), (three_ranks, {}), (three_ranks, GROUPS), (one_rank, GROUPS)):
        ours = group.run(two_steps, folder, extra, dtype, 0.5, "sgd")[0]
        assert ours["adds_up"]
        if group is three_ranks:
            direct = DIRECT | ({"lm_head.weight"} if more == CROSSED else set())
            assert ours["direct"] == (direct if more and dtype == torch.float32 else set())
        assert ours["norms"] == pytest.approx(theirs["norms"], rel=bound)
        for own, other in zip(ours["gradients"], theirs["gradients"], strict=True):
            assert distance(own, other) <= bound
        assert distance(ours["weights"], theirs["weights"]) <= bound


def test_every_rank_has_the_same_norm(three_ranks: WorkerGroup, tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama"))
    first, *others = (found["norms"] for found in three_ranks.run(two_steps, folder, {}, torch.float32))
    assert all(norms == first for norms in others)


def hidden_loss(model: CausalModel, micro: TokenBatch, count: Tensor) -> Loss:
    """Knows nothing of the head."""
    return Loss(model.hidden_states(micro.tokens).square().sum() / count, {})


def a_head_that_rests(world: World, folder: str) -> list[Tensor]:
    training = Training(learning_rate=0.1, optimizer="sgd", max_grad_norm=0.0)
    model = CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=8, training=training)
    batch, heads = token_batch().select(world.share(ROWS)), []
    for loss in (language_loss, hidden_loss, hidden_loss):
        model.accumulate(loss, batch)
        model.step()
        heads.append(dict(gathered_parameters(model.module))["lm_head.weight"].clone())
    return heads


@pytest.mark.parametrize("ranks", ["one_rank", "three_ranks"])
def test_what_a_step_does_not_use_does_not_move(request: pytest.FixtureRequest, tmp_path: Path, ranks: str) -> None:
    """Not by the gradient of the step before."""
    folder = str(save_tiny("llama", tmp_path / "llama"))
    heads = request.getfixturevalue(ranks).run(a_head_that_rests, folder)[0]
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2])


def test_gradients_without_a_bucket_go_deepspeeds_way(one_rank: WorkerGroup, tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama"))
    extra = {"zero_optimization": {"contiguous_gradients": False}}
    theirs, ours = (one_rank.run(two_steps, folder, more, torch.float32)[0] for more in (extra, {}))
    assert (theirs["adds_up"], ours["adds_up"]) == (False, True)
    assert distance(ours["weights"], theirs["weights"]) <= 2e-6


def weights_that_stay(world: World, folder: str, extra: dict[str, Any]) -> set[bool]:
    """Whether those of matrices do, once they are gathered."""
    model = CausalModel.load(
        folder, world, dtype=torch.float32, micro_batch_size=8, training=None, deepspeed_extra=extra
    )
    return {bool(p.ds_persist) for p in model.module.parameters() if p.ds_numel > 100}


def test_on_one_rank_weights_stay_unless_the_host_has_them(one_rank: WorkerGroup, tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama"))
    assert one_rank.run(weights_that_stay, folder, {})[0] == {True}
    small = {"zero_optimization": {"stage3_param_persistence_threshold": 100}}
    assert one_rank.run(weights_that_stay, folder, small)[0] == {False}
    config = zero3_config(World(0, 1, 0, 1, torch.device("cpu")), torch.float32, None, on_host({}))
    assert "stage3_param_persistence_threshold" not in config["zero_optimization"]


def masters_shared(world: World, folder: str, dtype: torch.dtype) -> bool:
    """Whether masters are the weights."""
    training = Training(learning_rate=0.1)
    model = CausalModel.load(folder, world, dtype=dtype, micro_batch_size=8, training=training)
    optimizer = model.engine.optimizer
    pairs = zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
    shared = {weights.data_ptr() == masters.data_ptr() for weights, masters in pairs}
    assert len(shared) == 1
    return shared.pop()


def test_in_fp32_masters_are_the_weights(one_rank: WorkerGroup, three_ranks: WorkerGroup, tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama"))
    assert one_rank.run(masters_shared, folder, torch.float32)[0]
    assert not three_ranks.run(masters_shared, folder, torch.bfloat16)[0]


def memory_of_gradients(world: World, folder: str) -> list[int]:
    """Numbers that gradients take: before any, within the second micro-batch, after a loss, after a second one, and
    after the step."""
    training = Training(learning_rate=0.1)
    model = CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=2, training=training)
    sums = model._sums
    assert sums is not None
    assert not model.engine.optimizer.ipg_buckets[torch.float32].buffer.numel()
    within: list[int] = []

    def held() -> int:
        return sum(memory.bytes for memory in sums._memory) // 4

    def loss(model: CausalModel, micro: TokenBatch, count: Tensor) -> Loss:
        within.append(held())
        return language_loss(model, micro, count)

    batch, found = token_batch().select(world.share(ROWS)), [held()]
    for _ in range(2):
        model.accumulate(loss, batch)
        found.append(held())
    model.step()
    return [found[0], within[1], *found[1:], held()]


def test_gradients_take_memory_until_the_step(one_rank: WorkerGroup, three_ranks: WorkerGroup, tmp_path: Path) -> None:
    """The whole of it until the loss is through, then the rank's own part."""
    folder = str(save_tiny("llama", tmp_path / "llama"))
    parameters = 2 * 131 * 32 + 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48 + 2 * 32) + 32
    assert one_rank.run(memory_of_gradients, folder)[0] == [0, parameters, parameters, parameters, 0]
    before, within, once, twice, after = three_ranks.run(memory_of_gradients, folder)[0]
    assert before == after == 0
    assert parameters <= within < parameters + 3 * 21  # each of 21 rounded up to three parts
    assert once == twice == within // 3


class _Used(Scratch):
    """As on a GPU, where memory holds what somebody left in it."""

    by_pages = False

    def take(self) -> bool:
        taken = super().take()
        if taken:
            torch.empty(0).set_(self._storage).fill_(torch.nan)
        return taken


def from_what_memory_held(world: World, folder: str) -> bool:
    """Whether all of the rank's part is a number, also what rounding up leaves."""
    with patch.object(gradients, "Scratch", _Used):
        model = CausalModel.load(
            folder, world, dtype=torch.float32, micro_batch_size=2, training=Training(learning_rate=0.1)
        )
    model.accumulate(language_loss, token_batch().select(world.share(ROWS)))
    return bool(model.engine.optimizer.grad_partitions_flat_buffer.isfinite().all())


def after_a_pass_that_failed(world: World, folder: str) -> bool:
    """The same where every sum was written, and none was finished."""
    model = CausalModel.load(
        folder, world, dtype=torch.float32, micro_batch_size=2, training=Training(learning_rate=0.1)
    )
    sums = model._sums
    assert sums is not None
    for parameter in model.module.parameters():
        sums.touch(parameter)
        for part in sums.parts(parameter):
            part.fill_(torch.nan)
    model.accumulate(language_loss, token_batch().select(world.share(ROWS)))
    return bool(model.engine.optimizer.grad_partitions_flat_buffer.isfinite().all())


@pytest.mark.parametrize("ranks", ["one_rank", "three_ranks"])
@pytest.mark.parametrize("case", [from_what_memory_held, after_a_pass_that_failed])
def test_what_memory_held_is_no_part_of_a_gradient(
    request: pytest.FixtureRequest, tmp_path: Path, ranks: str, case: Any
) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama"))
    assert all(request.getfixturevalue(ranks).run(case, folder))


def pages_of_an_embedding(world: World, folder: str) -> list[int]:
    """Resident bytes of the sums of its gradient after a loss on few tokens, and after clipping; and of all."""
    model = CausalModel.load(
        folder, world, dtype=torch.float32, micro_batch_size=8, training=Training(learning_rate=0.1)
    )
    sums, embedding = model._sums, model.module.model.embed_tokens.weight
    assert sums is not None
    [part], found = sums.parts(embedding), list[int]()
    with patch.object(sums, "release", lambda: found.append(resident_bytes(part))):
        model.accumulate(hidden_loss, token_batch().select(world.share(ROWS)))
        sums.release()
        assert model.step() > 1.0  # so that it is clipped
    return [*found, part.nbytes]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux alone")
def test_rows_of_a_large_vocabulary_that_no_token_has_take_no_memory(one_rank: WorkerGroup, tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama", vocab_size=200_000))
    held, clipped, whole = one_rank.run(pages_of_an_embedding, folder)[0]
    assert whole > 24 << 20
    assert 0 < held <= clipped < whole // 10


def large_vocabulary(
    world: World, folder: str, by_pages: bool, optimizer: str = "sgd", extra: dict[str, Any] | None = None
) -> tuple[bool, dict[str, Any]]:
    """Whether rows of the embedding's gradient were told apart; and `two_steps`, with clipping."""
    told, clipped = list[bool](), gradients.GradientSums._clip

    def clip(sums: gradients.GradientSums, number: int, norm: Tensor) -> None:
        told.append(bool(sums._rows))
        clipped(sums, number, norm)

    with patch.object(Scratch, "by_pages", by_pages), patch.object(gradients.GradientSums, "_clip", clip):
        found = two_steps(world, folder, extra or {}, torch.float32, 0.5, optimizer)
    return all(told), found


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux alone")
@pytest.mark.parametrize("ranks", ["one_rank", "three_ranks"])
def test_rows_alone_are_the_same_gradient(request: pytest.FixtureRequest, tmp_path: Path, ranks: str) -> None:
    """Of several micro-batches and losses, scaled to the bound of the norm."""
    folder = str(save_tiny("llama", tmp_path / "llama", vocab_size=60_000))
    group = request.getfixturevalue(ranks)
    (sparse, found), (dense, right) = (group.run(large_vocabulary, folder, how)[0] for how in (True, False))
    assert (sparse, dense) == (True, False)
    assert right["norms"][0] > 0.5
    assert found["norms"] == pytest.approx(right["norms"], rel=1e-6)
    assert all(distance(*pair) <= 1e-6 for pair in zip(found["gradients"], right["gradients"], strict=True))
    assert distance(found["weights"], right["weights"]) <= 1e-7


def rows_stepped(world: World, folder: str, extra: dict[str, Any]) -> tuple[list[bool], Any, Any, bool]:
    """Whether each step left rows out; what came of two of them, with and without; and whether DeepSpeed knows the
    optimizer."""
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    left_out, own = list[bool](), adam.RowAdamW._step_rows

    def step(optimizer: Any, parameter: Tensor, group: dict[str, Any]) -> bool:
        left_out.append(own(optimizer, parameter, group))
        return left_out[-1]

    with patch.object(adam.RowAdamW, "_step_rows", step):
        sparse = large_vocabulary(world, folder, True, "adamw", extra)[1]
    with patch.object(adam.RowAdamW, "_step_rows", lambda *_: False):
        dense = large_vocabulary(world, folder, True, "adamw", extra)[1]
    return left_out, sparse, dense, adam.RowAdamW in ZERO_SUPPORTED_OPTIMIZERS


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux alone")
@pytest.mark.parametrize("extra", [{}, {"zero_optimization": {"sub_group_size": 1_000_000}}])
def test_rows_without_a_gradient_are_not_stepped(one_rank: WorkerGroup, tmp_path: Path, extra: dict[str, Any]) -> None:
    """Where all weights are one group, and where the embedding has one of its own."""
    folder = str(save_tiny("llama", tmp_path / "llama", vocab_size=60_000))
    left_out, sparse, dense, known = one_rank.run(rows_stepped, folder, extra)[0]
    assert known
    assert left_out == ([True, True] if not extra else [True, False] * 2)
    assert sparse["norms"] == dense["norms"]
    assert distance(sparse["weights"], dense["weights"]) <= 1e-7


def step_without_a_loss(world: World, folder: str) -> float:
    """After one with: nothing of its gradient is left."""
    model = CausalModel.load(
        folder, world, dtype=torch.float32, micro_batch_size=2, training=Training(learning_rate=0.1)
    )
    model.accumulate(language_loss, token_batch().select(world.share(ROWS)))
    assert model.step() > 0
    return model.step()


@pytest.mark.parametrize("ranks", ["one_rank", "three_ranks"])
def test_a_step_without_a_loss_has_no_gradient(request: pytest.FixtureRequest, tmp_path: Path, ranks: str) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama"))
    assert set(request.getfixturevalue(ranks).run(step_without_a_loss, folder)) == {0.0}
