"""Recorded operations as tasks of the compiled library: which are, which only look like it, and to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.engine.joining import Done, apart, joined
from gearshift.engine.tape import _Log
from gearshift.kernels import decode_step, few_rows_linear, native

pytestmark = pytest.mark.skipif(native.built() is None, reason="the compiled library is not there")


def noted(step: Callable[[], Any]) -> tuple[list[Done], Any]:
    """What it did, and what has to stay for that to be done again."""
    log = _Log()
    with native.noted(log.note), log:
        step()
    return log.done, log.kept


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def test_rotary_embeddings_are_one_call() -> None:
    x = torch.randn(4, 1, 3, 16).transpose(1, 2)
    angle = torch.randn(4, 1, 1, 16)
    out = torch.empty(4, 3, 1, 16)
    done, _kept = noted(lambda: out.copy_(rotated(x, angle.cos(), angle.sin())))
    names = [one.name for one in apart(joined(done))]
    assert names == ["cos", "sin", "step_rotation", "copy_"]
    x.copy_(torch.randn_like(x))
    for one in joined(done):
        one.call()
    assert torch.equal(out, rotated(x, angle.cos(), angle.sin()))


@pytest.mark.parametrize(
    "other",
    [
        lambda x, c, s: x * c + torch.cat((-x[..., :8], x[..., 8:]), dim=-1) * s,  # the other halves
        lambda x, c, s: x * c + torch.cat((x[..., :8], -x[..., 8:]), dim=-1) * s,
        lambda x, c, s: x * c + torch.cat((-x[..., :8], x[..., :8]), dim=-1) * s,
        lambda x, c, s: (x * c, s + torch.cat((-x[..., 8:], x[..., :8]), dim=-1) * s)[1],  # a sum of other things
        lambda x, c, s: (a := x * c, torch.cat((-x[..., 8:], x[..., :8]), dim=-1) * s, a + s)[2],
        lambda x, c, s: x * c + torch.cat((-x[..., 8:], c[..., :8].expand(4, 3, 1, 8)), dim=-1) * s,
        lambda x, c, s: rotated(x.expand(4, 3, 2, 16), c, s),  # two positions
        lambda x, c, s: rotated(x.double(), c.double(), s.double()),
    ],
)
def test_what_only_looks_like_one_is_left(other: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    x, angle = torch.randn(4, 3, 1, 16), torch.randn(4, 1, 1, 16)
    names = [one.name for one in apart(joined(noted(lambda: other(x, angle, angle))[0]))]
    assert "step_rotation" not in names


@pytest.mark.parametrize("threads", [1, 2])
def test_a_layer_is_one_call(threads: int) -> None:
    """Everything between two operations of torch, to the bits of the step itself, by any number of threads."""
    x, out = torch.randn(5, 48), torch.empty(5, 48)
    norm, up, gate, down = torch.randn(48), torch.randn(80, 48), torch.randn(80, 48), torch.randn(48, 80)

    def step() -> None:
        normed = decode_step.norm(x, norm, 1e-6)
        gated = decode_step.silu(few_rows_linear(normed, gate)) * few_rows_linear(normed, up)
        out.copy_(x + few_rows_linear(gated, down))

    done, _kept = noted(step)
    calls = joined(done)
    assert [one.name for one in calls] == ["tasks", "copy_"]
    parts = [
        "step_norm",
        "few_rows_linear",
        "step_silu",
        "few_rows_linear",
        "step_product",
        "few_rows_linear",
        "step_sum",
    ]
    assert [one.name for one in apart(calls)] == [*parts, "copy_"]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(20):
            x.copy_(torch.randn_like(x))
            step()
            expected = out.clone()
            for one in calls:
                one.call()
            assert torch.equal(out, expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "other",
    [
        lambda a, b: torch.add(a, b, alpha=2),
        lambda a, b: a + 1.0,
        lambda a, b: a + b[:1],
        lambda a, b: a.t() * b.t(),
        lambda a, b: a.double() * b.double(),
        lambda a, b: a.mul(b.double()),
    ],
)
def test_sums_and_products_of_other_kinds_are_left(other: Callable[[Tensor, Tensor], Tensor]) -> None:
    done, _ = noted(lambda: other(torch.randn(4, 4), torch.randn(4, 4)))
    assert [one.name for one in joined(done)] == [one.name for one in done]
