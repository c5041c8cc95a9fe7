"""Which weights ZeRO-3 has gathered when, on layers of numbered parameters."""

from __future__ import annotations

import dataclasses

from gearshift.launch.planner.window import WholeWindow, Window, ZeroSettings, comes_whole

ZERO = ZeroSettings(persistence=0, prefetch=0)
NUMEL = [100, 200, 300]
FORWARD = [[0], [1], [2]]


def window(zero: ZeroSettings = ZERO, ranks: int = 2, train: bool = False) -> Window:
    sequence = FORWARD + FORWARD[::-1] if train else FORWARD
    return Window(sequence, len(FORWARD), NUMEL, ranks, 4, zero)


def run(found: Window, layers: list[list[int]]) -> list[int]:
    """Bytes while each layer works."""
    seen = []
    for layer in layers:
        found.fetch(layer)
        seen.append(found.bytes)
        found.release(layer)
    return seen


def test_without_prefetch_one_layer_is_there_at_a_time() -> None:
    found = window()
    assert run(found, FORWARD) == [400, 800, 1200]
    assert found.bytes == 0


def test_one_rank_has_its_weights_at_all_times() -> None:
    assert run(window(ranks=1), FORWARD) == [0, 0, 0]


def test_shards_are_padded_to_equal_lengths() -> None:
    assert run(window(ranks=3), FORWARD) == [102 * 4, 201 * 4, 300 * 4]


def test_small_parameters_stay_and_do_not_count() -> None:
    assert run(window(dataclasses.replace(ZERO, persistence=200)), FORWARD) == [0, 0, 1200]


def test_what_is_fetched_ahead_lies_there_twice_once_it_is_waited_for() -> None:
    """All-gathers of several parameters go through one flat buffer, which stays until the last of them is used."""
    found = window(dataclasses.replace(ZERO, prefetch=400))
    found.fetch([0])
    assert found.bytes == (100 + 500) * 4
    found.release([0])
    found.fetch([1])
    assert found.bytes == (500 + 500) * 4
    found.release([1])
    found.fetch([2])
    assert found.bytes == 300 * 4


def test_no_more_is_fetched_ahead_than_may_be_live() -> None:
    found = window(dataclasses.replace(ZERO, prefetch=400, max_live=100))
    found.fetch([0])
    assert found.bytes == 400


def test_in_the_backward_pass_what_is_used_again_soon_stays() -> None:
    twice = [[0], [1], [1], [0], [1]]
    kept, let_go = (Window(twice, 2, NUMEL, 2, 4, dataclasses.replace(ZERO, max_reuse=reuse)) for reuse in (1000, 50))
    for found, expected in ((kept, 800), (let_go, 0)):
        run(found, twice[:3])
        assert found.bytes == expected


def test_a_layer_that_is_entered_twice_is_left_once() -> None:
    """A layer that runs again in the backward pass may not come to its end, and then begins its own backward pass."""
    found = Window([[0], [0], [0], [0]], 1, NUMEL, 2, 4, dataclasses.replace(ZERO, max_reuse=0))
    found.fetch([0], module=1)
    found.release([0], module=1)
    found.fetch([0], module=1)
    found.fetch([0], module=1)
    found.fetch([0], module=2)
    found.release([0], module=1)
    assert found.bytes == 400
    found.release([0], module=2)
    assert found.bytes == 0


def test_a_view_that_autograd_keeps_holds_the_memory_of_what_was_released() -> None:
    found = window(train=True)
    found.fetch([0])
    found.keep(0)
    found.release([0])
    assert found.bytes == 400
    found.drop(0)
    assert found.bytes == 0


def test_a_small_model_comes_whole() -> None:
    """What stays does not count, and weights in host memory come layer by layer."""
    zero = ZeroSettings(persistence=150, prefetch=500)
    assert comes_whole(NUMEL, zero)
    assert not comes_whole(NUMEL, dataclasses.replace(zero, prefetch=499))
    assert not comes_whole(NUMEL, dataclasses.replace(zero, offload_param=True))
    found = WholeWindow(NUMEL, 3, 4, zero)
    found.fetch([0])
    assert (found.bytes, found.peak, found.left) == (501 * 4, 2 * 501 * 4, 0)
    assert WholeWindow(NUMEL, 1, 4, zero).bytes == 0


def test_settings_are_read_from_the_deepspeed_section() -> None:
    assert ZeroSettings.of({}) == ZeroSettings()
    section = {"reduce_bucket_size": 7, "stage3_prefetch_bucket_size": 8, "offload_optimizer": {"device": "cpu"}}
    found = ZeroSettings.of({"zero_optimization": section})
    assert (found.reduce_bucket, found.prefetch, found.offload_optimizer, found.offload_param) == (7, 8, True, False)
