"""Sums that a weight's gradient may join where it is computed, instead of being a tensor that is added later."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class WeightSum(Protocol):
    """Of a weight `[O, I]`. What was given between two calls of `done` has had each row but once, or in `add_rows`."""

    def add_product(self, first: int, left: Tensor, right: Tensor) -> None:
        """leftᵀ right to the rows from `first`: left `[T, n]`, right `[T, I]`."""

    def add_rows(self, rows: Tensor, values: Tensor) -> None:
        """values `[T, I]` to the rows `[T]`, of which some may be the same."""

    def done(self) -> None:
        """The gradient has joined as a whole."""


def sum_for(weight: Tensor, *others: Tensor) -> WeightSum | None:
    """Where the weight's gradient is to go, if it and what it is computed from are of the sum's type."""
    found: WeightSum | None = getattr(weight, "gradient_sum", None)
    return found if all(t.dtype == weight.dtype for t in others) else None


def keep_sum(weight: Any, found: WeightSum) -> None:
    """From here on gradients of the weight join this one, where they can."""
    weight.gradient_sum = found
