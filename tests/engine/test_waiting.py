"""Rows with the same prompt follow each other, and only the first of them reads it."""

import torch

from gearshift.engine import Prompts
from gearshift.engine.waiting import Admission, Waiting


def prompts(*rows: list[int]) -> Prompts:
    """Padded with a number of each row's own, which must not matter."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [90 + number] * (width - len(row)) for number, row in enumerate(rows)])
    zero = torch.zeros(len(rows), dtype=torch.int64)
    return Prompts(tokens, torch.tensor([len(row) for row in rows]), zero, zero, zero)


def test_the_longest_come_first_and_equal_ones_together() -> None:
    waiting = Waiting(prompts([5, 6], [7, 8, 9], [5, 7], [5, 6], [7, 8, 9]), 100)
    assert waiting.take([-1] * 5, 0) == Admission([1, 0, 2], [4, 3], [0, 1])
    assert not len(waiting)
    assert sum(waiting.left.values()) == 0


def test_a_copy_comes_from_a_slot_that_holds_the_prompt() -> None:
    """A working one, or a free one that nothing was written into since."""
    waiting = Waiting(prompts([9, 9], *[[3, 4]] * 5), 100)
    same, other = waiting.prompt_of[1], waiting.prompt_of[0]
    assert waiting.take([-1, -1], 0) == Admission([1], [2], [0])
    assert waiting.take([same, same], 1) == Admission([], [3], [0])
    assert waiting.take([7, same], 1) == Admission([], [4], [1])
    # It is nowhere any more: it is read again, beside another prompt.
    assert waiting.take([-1, -1, 7], 0) == Admission([5, 0], [], [])
    assert (same, other) == (0, 1)


def test_what_a_free_slot_holds_is_copied_before_another_prompt_is_read_over_it() -> None:
    waiting = Waiting(prompts([3, 4], [3, 4], [3, 4], [9, 9]), 100)
    assert waiting.take([-1], 0) == Admission([0], [], [])
    assert waiting.take([5, 5, 5, 0], 1) == Admission([], [1, 2], [3, 3])
    assert waiting.take([5, 0, 0, 0], 3) == Admission([3], [], [])


def test_slots_of_readers_come_after_the_working_ones() -> None:
    waiting = Waiting(prompts([1, 1], [2, 2], [2, 2], [1, 1]), 100)
    assert waiting.take([0, 1, 1, -1, -1, -1, -1], 3) == Admission([], [0, 3, 1, 2], [0, 0, 1, 1])
    waiting = Waiting(prompts([1, 1], [2, 2], [2, 2], [3, 3]), 100)
    assert waiting.take([0, -1, -1, -1, -1], 1) == Admission([1, 3], [0, 2], [0, 1])


def test_what_is_read_at_once_is_bounded() -> None:
    """By tokens with their padding, at least one prompt; copies cost nothing."""
    nine = [-1] * 9
    waiting = Waiting(prompts([1] * 4, [2] * 4, [2] * 4, [3] * 3, [4]), 8)
    assert waiting.take(nine, 0) == Admission([0, 1], [2], [1])
    assert waiting.take(nine, 3) == Admission([3, 4], [], [])
    waiting = Waiting(prompts([1] * 4, [2] * 4), 3)
    assert waiting.take(nine, 0) == Admission([0], [], [])
    assert waiting.take(nine, 1) == Admission([1], [], [])


def test_no_prompts_at_all() -> None:
    none = prompts([1]).select(slice(0, 0))
    assert len(Waiting(none, 10)) == 0
