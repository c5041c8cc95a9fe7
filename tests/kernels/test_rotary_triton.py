"""The rotary embedding of one position a row, against the way of `transformers`."""

from __future__ import annotations

import importlib

import pytest
import torch

from gearshift.kernels.rotary_triton import rotary
from tests.kernels.devices import device

# The package has no such function; the module of the compiled one has the formula.
PLAIN = importlib.import_module("gearshift.kernels.rotate_half").plain


@pytest.mark.parametrize(("rows", "heads", "kv_heads", "size"), [(1, 1, 1, 2), (3, 6, 2, 80), (5, 4, 4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_it_is_the_formula_with_its_roundings(
    rows: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype
) -> None:
    rng = torch.Generator().manual_seed(0)
    # As projections give them: heads side by side in a longer row.
    both = torch.randn(rows, heads + kv_heads, size, generator=rng).to(dtype)
    query, key = both[:, :heads], both[:, heads:]
    cos, sin = (torch.randn(rows, size, generator=rng).to(dtype) for _ in range(2))
    found = rotary(*(x.to(device()) for x in (query, key, cos, sin)))
    for own, x in zip(found, (query, key), strict=True):
        assert own.is_contiguous()
        want = PLAIN(x, cos, sin)
        assert torch.allclose(own.cpu(), want, rtol=0, atol=float(want.abs().max()) * torch.finfo(dtype).eps)
        if dtype == torch.float16:
            assert torch.equal(own.cpu(), want), "half precision rounds where torch does"


def test_one_row_of_angles_serves_all() -> None:
    x, cos, sin = torch.randn(4, 2, 8), torch.randn(1, 8), torch.randn(1, 8)
    found, _ = rotary(*(t.to(device()) for t in (x, x, cos, sin)))
    assert torch.allclose(found.cpu(), PLAIN(x, cos.expand(4, 8), sin.expand(4, 8)), atol=1e-5)
