"""`few_rows_linear` against fp64, by the compiled function and by torch's own where that does not serve."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gearshift.kernels import few_rows_linear

# The package's attribute of this name is the function.
MODULE = importlib.import_module("gearshift.kernels.few_rows_linear")
SHAPES = [(1, 1, 1), (1, 5, 9), (7, 300, 8), (16, 256, 50), (17, 257, 7), (32, 520, 33), (33, 5, 9)]


@pytest.fixture(params=["one thread", "two threads", "not built"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The compiled function, by one thread and by two; and torch's own, where it is not there."""
    monkeypatch.setattr(MODULE, "GRAIN", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2 if request.param == "two threads" else 1)
    if request.param == "not built":
        monkeypatch.setattr(MODULE, "tile", lambda: 0)
    yield request.param
    torch.set_num_threads(before)


def make(rows: int, features: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*size, generator=rng) for size in ((rows, features), (outputs, features), (outputs,)))  # type: ignore[return-value]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(way: str, shape: tuple[int, int, int]) -> None:
    x, weight, bias = make(*shape)
    for given in (bias, None):
        want = x.double() @ weight.double().t() + (0.0 if given is None else given.double())
        got = few_rows_linear(x, weight, given)
        assert got.dtype == torch.float32
        assert (got - want).abs().max() <= 4e-7 * shape[1] ** 0.5 * want.abs().max().clamp(min=1.0)


def test_any_number_of_dimensions_and_any_strides(way: str) -> None:
    x, weight, bias = make(12, 10, 9)
    want = x @ weight.t() + bias
    torch.testing.assert_close(few_rows_linear(x.view(3, 4, 10), weight, bias), want.view(3, 4, 9))
    torch.testing.assert_close(few_rows_linear(x.t().contiguous().t(), weight, bias), want)
    torch.testing.assert_close(few_rows_linear(x, weight.t().contiguous().t(), bias), want)
    torch.testing.assert_close(few_rows_linear(x, weight, bias.repeat_interleave(2)[::2]), want)


def test_infinities_and_nan_stay_in_their_row(way: str) -> None:
    x, weight, _ = make(3, 20, 9)
    x[1, 4], x[2, 3] = torch.nan, torch.inf
    got = few_rows_linear(x, weight)
    assert got[1].isnan().all()
    assert got[2].isinf().all()
    torch.testing.assert_close(got[0], x[0] @ weight.t())


def test_a_rows_bits_do_not_depend_on_its_neighbours() -> None:
    """So that a prompt gets the same answer in any batch. By the compiled function: torch does not promise it."""
    if not MODULE.tile():
        pytest.skip("the compiled function needs AVX2")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x, weight, bias = make(32, 300, 37)
        whole = few_rows_linear(x, weight, bias)
        for rows in ([0], [31], [3, 5], list(range(17)), list(range(31, -1, -1))):
            assert torch.equal(few_rows_linear(x[rows], weight, bias), whole[rows])
    finally:
        torch.set_num_threads(before)


def test_bits_do_not_depend_on_threads() -> None:
    """Which outputs are of one tile does: none is lost, and each adds its products in one order."""
    if not MODULE.tile():
        pytest.skip("the compiled function needs AVX2")
    before = torch.get_num_threads()
    try:
        for rows, features, outputs in ((1, 700, 301), (20, 384, 1000), (32, 8, 9)):
            x, weight, bias = make(rows, features, outputs)
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(few_rows_linear(x, weight, bias))
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)


def test_bf16_stays_bf16(way: str) -> None:
    x, weight, bias = (tensor.bfloat16() for tensor in make(4, 16, 8))
    got = few_rows_linear(x, weight, bias)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, torch.nn.functional.linear(x, weight, bias))
