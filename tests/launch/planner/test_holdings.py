"""What a rank holds of a model of 70 weights and 7 biases: shards of 18 and 2 on each of 4 ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from gearshift.launch.planner.holdings import Holding, holding, step_bytes
from gearshift.launch.planner.models import PaperModel
from gearshift.launch.planner.passes import Sharding
from gearshift.launch.planner.tracing import META
from gearshift.launch.planner.window import ZeroSettings

ZERO = ZeroSettings(reduce_bucket=100, persistence=10)
SMALL = 2 * 4 * 2  # the biases' padded shards in bf16, whole on every rank


def model(trained: bool = True) -> PaperModel:
    return PaperModel(nn.Linear(10, 7, device=META), trained)


def sharding(**zero: object) -> Sharding:
    return Sharding(4, 2, replace(ZERO, **zero))  # type: ignore[arg-type]


def test_a_model_that_trains() -> None:
    """Its gradients are there while it trains, or always where they do not fit into the bucket together."""
    expected = Holding(
        weights=20 * 2, whole=SMALL, gradients=20 * 4, optimizer=3 * 20 * 4, average=20 * 4, bucket=80 * 4, passing=True
    )
    assert holding(model(), sharding(), 2, True) == expected
    assert holding(model(), sharding(reduce_bucket=70), 2, True) == replace(expected, bucket=70 * 4, passing=False)
    assert holding(model(), sharding(), 0, False) == replace(expected, optimizer=20 * 4, average=0)


def test_one_rank_keeps_nothing_whole_beside_its_shards() -> None:
    held = holding(model(), Sharding(1, 2, ZERO), 2, True)
    assert (held.weights, held.whole, held.bucket) == (77 * 2, 0, 0)


def test_in_fp32_the_shards_are_the_masters() -> None:
    assert holding(model(), Sharding(4, 4, ZERO), 2, True).optimizer == 2 * 20 * 4
    away = replace(ZERO, offload_optimizer=True)
    assert holding(model(), Sharding(4, 4, away), 2, False).host == (3 + 2) * 20 * 4


def test_on_the_host_lie_the_optimizer_and_two_copies_of_the_gradients() -> None:
    held = holding(model(), sharding(offload_optimizer=True), 2, True)
    assert held == Holding(weights=20 * 2, whole=SMALL, bucket=100 * 4, host=(3 + 1 + 2) * 20 * 4)


def test_weights_on_the_host() -> None:
    """Of a frozen model, the small ones stay on the device."""
    held = holding(model(trained=False), sharding(offload_param=True), 2, False)
    assert held == Holding(weights=2 * 2, whole=SMALL, host=18 * 2)
    held = holding(model(), sharding(offload_param=True), 2, False)
    assert (held.weights, held.host) == (0, 20 * 2)


@pytest.mark.parametrize(("sub_group", "elements"), [(1000, 20), (18, 18), (1, 18)])
def test_a_step_takes_one_group_of_parameters_at_a_time(sub_group: int, elements: int) -> None:
    grouped = sharding(sub_group=sub_group, reduce_bucket=70)
    assert step_bytes(model(), grouped) == elements * 4


def test_a_step_on_the_host_takes_nothing_of_the_device() -> None:
    assert step_bytes(model(), sharding(offload_optimizer=True)) == 0
