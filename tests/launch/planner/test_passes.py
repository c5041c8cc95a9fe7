"""What one pass takes at its peak, on timelines written by hand."""

from __future__ import annotations

import pytest

from gearshift.launch.planner.passes import Need, Sharding, need
from gearshift.launch.planner.tracing import Event, Timeline
from gearshift.launch.planner.window import ZeroSettings

ZERO = ZeroSettings(persistence=0, prefetch=0)


def gradients(*live: int) -> Timeline:
    """One gradient of 400 numbers, between two sizes of what is live."""
    before, after = live
    return Timeline([], [400], 0, [Event("live", before), Event("gradient", 0), Event("live", after)])


@pytest.mark.parametrize(("itemsize", "expected"), [(4, 400 * 4), (2, 400 * 2 + 400 * 4)])
def test_a_gradient_larger_than_the_bucket_is_widened_to_be_reduced(itemsize: int, expected: int) -> None:
    sharding = Sharding(1, itemsize, ZeroSettings(reduce_bucket=300))
    assert need(gradients(0, 0), sharding).gradients == expected


def test_a_gradient_that_is_kept_counts_once_while_it_is_live() -> None:
    assert need(gradients(5000, 0), Sharding(1, 4, ZeroSettings(reduce_bucket=300))) == Need(activations=5000)


def test_scratch_memory_is_there_for_a_moment() -> None:
    timeline = Timeline([], [], 0, [Event("live", 100), Event("scratch", 30), Event("live", 110)])
    assert need(timeline, Sharding(1, 4, ZERO)) == Need(activations=130)


def test_an_all_gather_of_several_parameters_lies_there_twice() -> None:
    timeline = Timeline([[0, 1]], [100, 200], 1, [Event("fetch", 0), Event("release", 0)])
    assert need(timeline, Sharding(2, 4, ZERO)) == Need(gathered=2 * 300 * 4)


def test_a_forward_pass_alone_leaves_what_was_fetched_for_the_backward_pass() -> None:
    alone = [Event("fetch", 0), Event("release", 0), Event("fetch", 1), Event("release", 1)]
    back = [Event("fetch", 1), Event("release", 1), Event("fetch", 0), Event("release", 0)]
    forward, trained = (Timeline([[0], [1]], [100, 200], 2, events) for events in (alone, alone + back))
    ahead = Sharding(2, 4, ZeroSettings(persistence=0, prefetch=150))
    assert need(forward, ahead).left == 0
    assert need(forward, ahead, trained).left == 100 * 4
