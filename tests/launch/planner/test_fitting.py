"""The search for what fits."""

from __future__ import annotations

import pytest

from gearshift.launch.planner.fitting import largest


@pytest.mark.parametrize(("limit", "most", "expected"), [(5, 8, 5), (9, 8, 8), (0, 8, 0), (1, 1, 1)])
def test_the_largest_number_that_fits(limit: int, most: int, expected: int) -> None:
    assert largest(most, lambda n: n <= limit) == expected
