"""rms_norm against its formula in fp64: compiled, by torch and by Triton; rows do not depend on each other."""

import pytest
import torch

from gearshift.kernels import native, rms_norm, rms_norm_triton
from gearshift.kernels.rms_norm import plain
from tests.kernels.devices import device


def by_triton(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, rounds: bool = False) -> torch.Tensor:
    return rms_norm_triton.norm(x.to(device()), weight.to(device()), eps, offset, rounds).cpu()


@pytest.mark.parametrize("features", [1, 7, 16, 37, 384, 1000])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (33,)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_it_is_the_formula(features: int, shape: tuple[int, ...], offset: float) -> None:
    g = torch.Generator().manual_seed(features)
    x, weight = 3 * torch.randn(*shape, features, generator=g), torch.randn(features, generator=g)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + offset)
    for norm in (rms_norm, plain, by_triton):
        found = norm(x, weight, 1e-5, offset)
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1)


def test_the_compiled_one_serves() -> None:
    assert native.built() is not None


def test_a_row_s_bits_do_not_depend_on_the_rows_beside_it() -> None:
    x, weight = torch.randn(40, 384), torch.randn(384)
    whole = rms_norm(x, weight, 1e-6)
    assert all(torch.equal(rms_norm(x[row], weight, 1e-6), whole[row]) for row in range(40))


def test_edges() -> None:
    """No row, a row of zeros, values that no square of fp32 holds in small, inputs that are not contiguous, bf16."""
    weight = torch.ones(8)
    assert rms_norm(torch.empty(0, 8), weight, 1e-6).shape == (0, 8)
    assert torch.equal(rms_norm(torch.zeros(2, 8), weight, 1e-6), torch.zeros(2, 8))
    small = rms_norm(torch.full((1, 8), 1e-20), weight, 0.0)
    assert bool((small.isfinite() | small.isinf()).all())
    turned = torch.randn(8, 5).t()
    assert torch.equal(rms_norm(turned, weight, 1e-6), rms_norm(turned.contiguous(), weight, 1e-6))
    assert rms_norm(torch.randn(2, 8).bfloat16(), weight.bfloat16(), 1e-6).dtype == torch.bfloat16


@pytest.mark.parametrize("rounds", [False, True])
def test_triton_rounds_as_torch_does(rounds: bool) -> None:
    """The same bits but where fp32 sums in another order fall on the other side of a rounding."""
    half = torch.bfloat16 if device() == "cuda" else torch.float16  # the interpreter cuts bf16 in place of rounding
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 384, generator=g).to(half), torch.randn(384, generator=g).to(half)
    found, want = by_triton(x, weight, 1e-5, 0.0, rounds), plain(x, weight, 1e-5, 0.0, rounds)
    assert found.dtype == half
    assert float((found != want).float().mean()) < 0.01
    assert (plain(x, weight, 1e-5, 0.0, not rounds) != want).float().mean() > 0.1
