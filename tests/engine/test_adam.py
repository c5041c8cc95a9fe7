"""Steps of AdamW that leave rows out, against torch's on everything."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.engine import adam
from gearshift.engine.adam import Part, RowAdamW
from tests.memory import resident_bytes

V, H, BEFORE, AFTER = 40, 24, 100, 30
MATRIX = slice(BEFORE, BEFORE + V * H)
SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "fused": True, "weight_decay": 0.0}


def close(found: Tensor, right: Tensor) -> None:
    """But for how a processor rounds what is left beside whole vectors."""
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-7)


class Pair:
    """The same flat weights, of which a matrix is a part, in both optimizers."""

    def __init__(self, weight_decay: float = 0.0):
        settings = {**SETTINGS, "weight_decay": weight_decay}
        start = torch.randn(BEFORE + V * H + AFTER)
        self.own, self.right = (torch.nn.Parameter(start.clone()) for _ in range(2))
        self.optimizer = RowAdamW([self.own], **settings)
        self.theirs = torch.optim.AdamW([self.right], **settings)
        self.rows: Tensor | None = None
        self.optimizer.parts = lambda flat: self.parts()

    def parts(self) -> list[Part]:
        if self.rows is None:
            return [Part(0, self.own.numel())]
        return [Part(0, BEFORE), Part(MATRIX.start, MATRIX.stop, self.rows, H), Part(MATRIX.stop, self.own.numel())]

    def step(self, rows: list[int] | None) -> None:
        """With a gradient in these rows alone; None: in all, and no rows are told."""
        self.rows = None if rows is None else torch.tensor(rows)
        gradient = torch.randn(self.own.numel())
        if rows is not None:
            kept = torch.zeros(V, 1)
            kept[rows] = 1.0
            gradient[MATRIX] = (gradient[MATRIX].view(V, H) * kept).view(-1)
        for parameter, optimizer in ((self.own, self.optimizer), (self.right, self.theirs)):
            parameter.grad = gradient.clone()
            optimizer.step()

    def check(self) -> None:
        close(self.own.data, self.right.data)
        (state,), (right,) = self.optimizer.state.values(), self.theirs.state.values()
        assert state.keys() == right.keys()
        for name in right:
            close(state[name], right[name])


@pytest.mark.parametrize(
    "steps",
    [
        [[3, 7], [7, 39], [0]],  # a row moves on by the moments that it has
        [[3], list(range(25)), [1]],  # more than half of them
        [[3], None, [1], [2]],  # a step of all between
        [None, [1]],
    ],
)
@pytest.mark.parametrize("block", [adam.BLOCK, 2])
def test_it_is_the_same(monkeypatch: pytest.MonkeyPatch, steps: list[list[int] | None], block: int) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(adam, "BLOCK", block)
    pair = Pair()
    for rows in steps:
        pair.step(rows)
        pair.check()


def test_only_rows_that_have_moments_are_stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def spy(weights: list[Tensor], *others: Any, **more: Any) -> None:
        taken.extend(len(w) for w in weights if w.shape[1:] == (H,))
        own(weights, *others, **more)

    own = adam.adamw
    monkeypatch.setattr(adam, "adamw", spy)
    pair = Pair()
    for rows in ([3, 7], [7, 39], list(range(25))):
        pair.step(rows)
    assert taken == [2, 3]  # the third step is torch's own


def test_rows_whose_gradient_is_zero_have_no_moments() -> None:
    """So that whoever loads them finds the same rows."""
    pair = Pair()
    pair.rows = torch.tensor([3, 7])
    pair.own.grad = torch.zeros_like(pair.own)
    pair.own.grad[MATRIX.start + 7 * H] = 1.0
    pair.optimizer.step()
    [live] = pair.optimizer._live.values()
    assert live.nonzero().flatten().tolist() == [7]


def test_decay_moves_every_row() -> None:
    pair = Pair(weight_decay=0.1)
    pair.step([3])
    pair.check()
    assert pair.optimizer._live == {}


def test_loaded_moments_say_which_rows_have_some() -> None:
    torch.manual_seed(0)
    before, after = Pair(), Pair()
    before.step([3, 7])
    after.own.data.copy_(before.own.data)
    after.right.data.copy_(before.right.data)
    after.step([20])  # what it had is gone with the next line
    after.own.data.copy_(before.own.data)
    after.right.data.copy_(before.right.data)
    after.optimizer.load_state_dict(before.optimizer.state_dict())
    after.theirs.load_state_dict(before.theirs.state_dict())
    after.step([5])
    after.check()
    [live] = after.optimizer._live.values()
    assert live.nonzero().flatten().tolist() == [3, 5, 7]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux alone")
def test_moments_that_are_zeros_take_no_memory() -> None:
    rows, width = 50_000, 128
    weights = torch.nn.Parameter(torch.zeros(rows * width))
    optimizer = RowAdamW([weights], **SETTINGS)
    optimizer.parts = lambda flat: [Part(0, len(flat), torch.arange(0, 2000, 100), width)]
    weights.grad = torch.zeros_like(weights)
    weights.grad[:100_000] = 1.0
    optimizer.step()
    [state] = optimizer.state.values()
    moments = state["exp_avg"], state["exp_avg_sq"]
    assert all(0 < resident_bytes(moment) < moment.nbytes // 20 for moment in moments)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: {k: v.clone() for k, v in state.items()}}})
    [state] = optimizer.state.values()
    optimizer.step()
    assert all(0 < resident_bytes(state[name]) < weights.nbytes // 20 for name in ("exp_avg", "exp_avg_sq"))
