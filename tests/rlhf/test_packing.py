"""Sequences that share a row: the loss and its gradient are those of each alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import CausalModel, Training, World
from gearshift.errors import SettingError
from gearshift.rlhf.data.batches import collate_text, pack_text
from gearshift.rlhf.data.encoding import IGNORED, Block, Demonstration
from gearshift.rlhf.language import language_loss
from tests.models import SIZES, save_tiny
from tests.rlhf.test_reward import distance
from tests.worker_group import WorkerGroup

LONGEST = 24


def rows(count: int) -> list[Demonstration | Block]:
    """Demonstrations of 2 to 24 tokens, with some text among them."""
    from array import array

    g = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return [int(t) for t in torch.randint(0, SIZES["vocab_size"], (length,), generator=g)]

    found: list[Demonstration | Block] = []
    for number in range(count):
        length = int(torch.randint(2, LONGEST + 1, (1,), generator=g))
        if number % 5 == 4:
            found.append(Block(array("i", tokens(length + 1))))
        else:
            asked = int(torch.randint(1, length, (1,), generator=g))
            found.append(Demonstration(tokens(asked), tokens(length - asked)))
    return found


def test_every_sequence_is_in_one_row_with_its_own_positions() -> None:
    given = rows(30)
    batch = pack_text([*given, None], LONGEST)
    assert batch.tokens.shape[1] <= LONGEST
    assert len(batch) <= sum(len(row.shifted()[0]) for row in given) / LONGEST + 4
    found = []
    for row in range(len(batch)):
        starts = (batch.positions[row] == 0).nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], batch.tokens.shape[1]], strict=True):
            assert batch.positions[row, start:end].tolist() == list(range(end - start))
            found.append((batch.tokens[row, start:end].tolist(), batch.targets[row, start:end].tolist()))
    with_loss = sorted(pair for pair in found if any(target != IGNORED for target in pair[1]))
    assert with_loss == sorted(row.shifted() for row in given)
    assert batch.loss_count == collate_text(given).loss_count
    again = pack_text([*given, None], LONGEST)
    assert torch.equal(again.tokens, batch.tokens)


def test_a_sequence_over_the_limit_has_a_row_of_its_own() -> None:
    batch = pack_text([Demonstration([1], [2] * 9), Demonstration([1], [2])], 4)
    assert batch.tokens.shape == (2, 10)


def loss_and_gradient(world: World, folder: str, pack: bool, micro: int) -> tuple[float, dict[str, torch.Tensor]]:
    from deepspeed.utils import safe_get_full_grad

    training = Training(learning_rate=0.1, optimizer="sgd", max_grad_norm=0.0)
    model = CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=micro, training=training)
    if pack:
        model.check_packing()
    collate = partial(pack_text, most=LONGEST) if pack else collate_text
    sums = model.accumulate(language_loss, collate(rows(21)[world.rank :: world.size]))
    gradients = {name: safe_get_full_grad(p).clone() for name, p in model.module.named_parameters()}
    model.step()
    return float(sums["loss"]), gradients


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_packed_rows_have_the_loss_and_gradient_of_each_alone(
    two_ranks: WorkerGroup, tmp_path: Path, family: str
) -> None:
    """Rotary positions, learned ones, and a window shorter than the sequences."""
    folder = str(save_tiny(family, tmp_path / family))
    loss, gradients = two_ranks.run(loss_and_gradient, folder, False, 1)[0]  # one row at a time: nothing is padded
    packed, packed_gradients = two_ranks.run(loss_and_gradient, folder, True, 3)[0]
    assert packed == pytest.approx(loss, rel=1e-6)
    assert distance(packed_gradients, gradients) <= 1e-5


def told_of(world: World, folder: str) -> str:
    model = CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=1)
    backbone: Any = model.module.base_model
    if model.config.model_type == "llama":  # as families without such an argument
        own = backbone.forward
        backbone.forward = lambda input_ids, use_cache: own(input_ids=input_ids, use_cache=use_cache)
    try:
        model.check_packing()
    except SettingError as error:
        return f"{error.field}: {error.problem}"
    return ""


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_model_that_does_not_keep_them_apart_is_refused(two_ranks: WorkerGroup, tmp_path: Path, family: str) -> None:
    """OPT takes positions, but its attention does not look at them; and a backbone that takes none."""
    folder = str(save_tiny(family, tmp_path / family))
    for told in two_ranks.run(told_of, folder):
        assert told.startswith("train.pack: in a ")
        assert "sequences that share a row are not kept apart" in told
