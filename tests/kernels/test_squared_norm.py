"""Sums of squares against fp64."""

from __future__ import annotations

import pytest
import torch

from gearshift.kernels.squared_norm import squared_norm
from tests.kernels.threads import with_threads


@pytest.mark.parametrize("count", [0, 1, 15, 33, 4096, 65_537, 200_000])
def test_squares_add_up_as_in_fp64(count: int) -> None:
    """With any number of threads to the same bits."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(0))
    one, two = (float(with_threads(n, lambda: squared_norm(x))) for n in (1, 2))
    assert one == two == pytest.approx(float(x.double().square().sum()), rel=1e-6)


def test_any_type_and_any_stride() -> None:
    x = torch.arange(10.0)
    for same in (x.double(), x.bfloat16()):
        assert float(squared_norm(same)) == pytest.approx(285)
    assert float(squared_norm(x[::3])) == pytest.approx(9 + 36 + 81)


def test_squares_below_fp32() -> None:
    assert float(squared_norm(torch.full((1000,), 1e-21))) == pytest.approx(1e-39, rel=1e-6)
    assert float(squared_norm(torch.zeros(1000))) == 0


def test_squares_past_fp32() -> None:
    x = torch.full((70_000,), 1e25)
    assert float(squared_norm(x)) == pytest.approx(7e54, rel=1e-6)
    assert float(squared_norm(torch.tensor([1.0, torch.nan]))) != float(squared_norm(torch.tensor([1.0])))
    assert squared_norm(torch.tensor([1.0, torch.inf])).isinf()
