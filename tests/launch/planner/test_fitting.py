"""The search for what fits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gearshift.launch.planner import fitting
from gearshift.launch.planner.fitting import IN_ROLLOUTS, changes, largest


@pytest.mark.parametrize(("limit", "most", "expected"), [(5, 8, 5), (9, 8, 8), (0, 8, 0), (1, 1, 1)])
def test_the_largest_number_that_fits(limit: int, most: int, expected: int) -> None:
    assert largest(most, lambda n: n <= limit) == expected


@pytest.mark.parametrize(
    ("memory", "told"), [(95, [IN_ROLLOUTS]), (50, ["always"]), (30, ["always", "last"]), (10, ["always", "last"])]
)
def test_what_leaves_more_room_is_told_where_the_setting_that_excludes_it_is_not_enough(
    monkeypatch: pytest.MonkeyPatch, memory: int, told: list[str]
) -> None:
    saved = {IN_ROLLOUTS: 10, "always": 60, "last": 15}

    def plan(*settings: str) -> Any:
        total = 100 - sum(saved[name] for name in settings)
        return SimpleNamespace(settings=settings, largest=SimpleNamespace(total=total))

    def is_free(plan: Any, memory: float) -> Any:
        return True if not {IN_ROLLOUTS, "always"} & set(plan.settings) else None

    candidates = [(IN_ROLLOUTS, is_free), ("always", is_free), ("last", lambda plan, memory: True)]
    monkeypatch.setattr(fitting, "_candidates", lambda: iter(candidates))
    monkeypatch.setattr(fitting, "with_setting", lambda before, field, value: plan(*before.settings, field))
    assert [change.field for change in changes(plan(), memory)] == told
