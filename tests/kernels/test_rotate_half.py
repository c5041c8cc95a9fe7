"""rotate_half gives the bits of the operations that it stands for."""

import pytest
import torch

from gearshift.kernels.rotate_half import plain, rotate_half


@pytest.mark.parametrize(("rows", "heads", "size"), [(1, 1, 2), (3, 2, 8), (16, 3, 64), (5, 7, 40)])
def test_bits(rows: int, heads: int, size: int) -> None:
    g = torch.Generator().manual_seed(size)
    x = torch.randn(rows, heads, size, generator=g)
    angles = torch.randn(rows, size, generator=g) * 50
    out = torch.empty_like(x)
    rotate_half(x, angles.cos(), angles.sin(), out)
    assert torch.equal(out, plain(x, angles.cos(), angles.sin()))


def test_strides() -> None:
    """A part of each head, heads that lie apart, the same angles for all rows."""
    whole, angles = torch.randn(4, 3, 32), torch.randn(1, 16).expand(4, 16)
    x, out = whole[..., :16], torch.zeros(3, 4, 16).transpose(0, 1)
    rotate_half(x, angles.cos(), angles.sin(), out)
    assert torch.equal(out, plain(x, angles.cos(), angles.sin()))
