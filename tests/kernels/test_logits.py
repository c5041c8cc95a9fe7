"""One chunk's logits by the compiled library, against operations of torch in fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from gearshift.kernels import native
from gearshift.kernels.linear_logprob_cpu import Slopes, _block_state, _chunk_state
from gearshift.kernels.states import finite
from tests.kernels.threads import with_threads

pytestmark = pytest.mark.skipif(native.built() is None, reason="no C compiler built the library")

SIZES = [(1, 1), (3, 15), (5, 16), (4, 17), (7, 257), (33, 4096), (600, 300)]


def chunk(tokens: int, columns: int) -> tuple[Tensor, Tensor]:
    """Logits, some of them −inf, in one row all; and columns of targets, some of them before or past the chunk."""
    generator = torch.Generator().manual_seed(0)
    z = 8 * torch.randn(tokens, columns, generator=generator)
    z[torch.rand(z.shape, generator=generator) < 0.1] = -torch.inf
    if tokens > 2:
        z[1] = -torch.inf
    return z, torch.randint(-columns, 2 * columns, (tokens,), generator=generator)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("entropy", [False, True])
def test_states(size: tuple[int, int], entropy: bool) -> None:
    z, column = chunk(*size)
    found, again = (with_threads(n, lambda: _chunk_state(z, column, entropy)) for n in (1, 2))
    wide = z.double()
    right = _block_state(wide, column, torch.empty_like(wide) if entropy else None)
    assert torch.equal(found, again) or found.isnan().any()
    assert torch.allclose(found.double(), right, rtol=1e-6, atol=1e-6, equal_nan=True)
    if not entropy:
        assert not found[:, 2].any()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("entropy", [False, True])
def test_gradients(size: tuple[int, int], entropy: bool) -> None:
    z, column = chunk(*size)
    generator = torch.Generator().manual_seed(1)
    state = _block_state(z.double(), column, torch.empty(z.shape, dtype=torch.float64))
    slopes = [torch.randn(len(z), generator=generator, dtype=torch.float64) for _ in range(2)]
    wide = Slopes.of(state, 1.0, slopes[0], slopes[1] if entropy else None)
    narrow = dataclasses.replace(
        wide, **{f.name: None if (v := getattr(wide, f.name)) is None else v.float() for f in dataclasses.fields(wide)}
    )
    right = wide.logit_gradient(z.double(), column, torch.empty(z.shape, dtype=torch.float64))
    found = z.clone()
    assert narrow.logit_gradient(found, column, None) is found
    assert torch.allclose(found.double(), right, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_is_seen(value: float) -> None:
    z, column = chunk(3, 40)
    z[0, 7], z[2] = value, value
    found = _chunk_state(z, column, True)
    assert not found[[0, 2], 1].isfinite().any()
    assert finite(found[:, 0])[1] == 0
