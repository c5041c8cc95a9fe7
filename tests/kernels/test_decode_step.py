"""What a step of decoding does between its products: the bits of torch's operations, or their values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gearshift.kernels import decode_step, native, rms_norm
from gearshift.kernels.native import tasks
from gearshift.kernels.rotate_half import plain

pytestmark = pytest.mark.skipif(native.built() is None, reason="the compiled library is not there")


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 1, 384), (700, 200)])
def test_norm_has_the_bits_of_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = noise(*shape), noise(shape[-1])
    assert torch.equal(decode_step.norm(x, weight, 1e-6, 1.0), rms_norm(x, weight, 1e-6, 1.0))
    turned = noise(shape[-1], 5).t()
    assert torch.equal(decode_step.norm(turned, weight, 1e-6), rms_norm(turned, weight, 1e-6))


@pytest.mark.parametrize("numbers", [1, 15, 16, 257, 5000])
def test_silu(numbers: int) -> None:
    x = noise(numbers) * 20
    want = x.double() / (1 + torch.exp(-x.double()))
    found = decode_step.silu(x)
    assert ((found - want).abs() <= 4e-7 * want.abs() + 1e-30).all()


def test_a_row_of_silu_knows_no_other() -> None:
    x = noise(40, 100)
    assert all(torch.equal(decode_step.silu(x[: rows + 1])[rows], decode_step.silu(x[rows])) for rows in range(32))
    assert torch.equal(decode_step.silu(x), torch.nn.functional.silu(x))  # not of a step


def test_silu_far_out() -> None:
    x = torch.tensor([0.0, -0.0, 88.0, -88.0, 1e30, -1e4, torch.inf, torch.nan])
    found = decode_step.silu(x)
    torch.testing.assert_close(found[:-1], torch.nn.functional.silu(x)[:-1], rtol=1e-6, atol=1e-30)
    assert found[-1].isnan()


@pytest.mark.parametrize("shape", [(1,), (5, 300), (16, 1024)])
def test_sums_and_products_have_the_bits_of_torch(shape: tuple[int, ...]) -> None:
    a, b, out = noise(*shape), noise(*shape) + 1, torch.empty(*shape)
    tasks.do(decode_step.sum_of(a, b, out))
    assert torch.equal(out, a + b)
    tasks.do(decode_step.product_of(a, b, out))
    assert torch.equal(out, a * b)
    tasks.do(decode_step.sum_of(out, b, out))
    assert torch.equal(out, a * b + b)


@pytest.mark.parametrize(("rows", "heads", "size"), [(1, 1, 2), (3, 2, 8), (16, 3, 64), (5, 7, 40)])
def test_rotation_has_the_bits_of_torch(rows: int, heads: int, size: int) -> None:
    x, angles, out = noise(rows, heads, size), noise(rows, size) * 50, torch.empty(rows, heads, size)
    cos, sin = angles.cos(), angles.sin()
    tasks.do(decode_step.rotation(x, cos, sin, out))
    assert torch.equal(out, plain(x, cos, sin))


def test_rotation_with_strides() -> None:
    """A part of each head, heads that lie apart, the same angles for all rows."""
    x, out = noise(4, 3, 32)[..., :16], torch.zeros(3, 4, 16).transpose(0, 1)
    angles = noise(1, 16).expand(4, 16)
    cos, sin = angles.cos(), angles.sin()
    tasks.do(decode_step.rotation(x, cos, sin, out))
    assert torch.equal(out, plain(x, cos, sin))
