"""Rows dealt out to ranks and micro-batches."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.engine.balance import balanced, by_length, parts_needed

SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 8))
def test_every_row_is_dealt_once_and_no_part_is_far_from_the_others(sizes: list[int], parts: int) -> None:
    parts = min(parts, len(sizes))
    dealt = balanced(sizes, parts)
    assert sorted(row for part in dealt for row in part) == list(range(len(sizes)))
    totals = [sum(sizes[row] for row in part) for part in dealt]
    assert min(map(len, dealt)) >= 1
    assert max(totals) - min(totals) <= max(sizes)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 8))
def test_a_bound_on_rows_is_kept(sizes: list[int], parts: int) -> None:
    most = -(-len(sizes) // parts)
    dealt = balanced(sizes, parts, most)
    assert sorted(row for part in dealt for row in part) == list(range(len(sizes)))
    assert max(map(len, dealt)) <= most


def test_rows_of_like_length_go_together() -> None:
    assert by_length([5, 90, 6, 88, 40, 41], 3) == [[1, 3], [4, 5], [0, 2]]
    assert by_length([1, 2, 3], 2) == [[2], [0, 1]]


def test_micro_batches_by_rows_or_by_tokens() -> None:
    assert parts_needed([10] * 9, 4, None) == 3
    assert parts_needed([10] * 9, 4, 50) == 2
    assert parts_needed([50, 30, 30, 10], 4, 60) == 2
    assert parts_needed([40, 40, 40], 4, 60) == 3, "two of them would have too many tokens"
    assert parts_needed([500, 10], 4, 60) == 2, "a longer row is alone"
    assert parts_needed([], 4, 60) == 0


def test_by_hand() -> None:
    assert balanced([7, 2, 5, 4, 1], 2) == [[0, 1, 4], [2, 3]]  # 7 | 5, then 4, then 2 and 1 beside the 7
