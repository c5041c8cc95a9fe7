"""The rotary embedding of whole sequences gives the bits of the operations that it stands for."""

from typing import Any

import pytest
import torch

from gearshift.kernels.rotate_half import plain, rotary
from tests.kernels.threads import with_threads


def states(rows: int, heads: int, positions: int, size: int, seed: int = 0) -> torch.Tensor:
    """As a projection gives them: the heads of a position side by side."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, positions, heads, size, generator=g).transpose(1, 2)


def passes(own: Any, *given: torch.Tensor) -> list[torch.Tensor]:
    """Results, and the gradients of queries and keys."""
    q, k = (x.clone().requires_grad_() for x in given[:2])
    found = own(q, k, *given[2:])
    slopes = [torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape) for x in found]
    torch.autograd.backward(found, slopes)
    return [*(x.detach() for x in found), q.grad, k.grad]


def by_torch(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    def turned(x: torch.Tensor) -> torch.Tensor:
        flat = plain(x.transpose(1, 2).flatten(0, 1), cos.flatten(0, 1), sin.flatten(0, 1))
        return flat.unflatten(0, cos.shape[:2]).transpose(1, 2)

    return turned(q), turned(k)


@pytest.mark.parametrize(
    ("rows", "heads", "positions", "size"), [(1, 3, 5, 8), (2, 2, 7, 6), (1, 4, 400, 64), (3, 1, 1, 2), (1, 2, 0, 4)]
)
def test_sequences(rows: int, heads: int, positions: int, size: int) -> None:
    """Angles whose halves differ: the backward pass is the transposed product, not a turn by negative ones."""
    q, k = states(rows, heads, positions, size), states(rows, 1, positions, size, seed=1)
    cos, sin = torch.randn(2, rows, positions, size).unbind()
    found = passes(rotary, q, k, cos, sin)
    for own, want in zip(found, passes(by_torch, q, k, cos, sin), strict=True):
        assert torch.equal(own, want)


def test_one_row_of_angles_for_all_and_heads_that_lie_apart() -> None:
    q, k = states(3, 4, 5, 16).contiguous(), states(3, 2, 5, 32)[..., :16]
    cos, sin = torch.randn(2, 1, 5, 16).unbind()
    wanted = passes(by_torch, q, k, cos.expand(3, -1, -1), sin.expand(3, -1, -1))
    assert all(torch.equal(a, b) for a, b in zip(passes(rotary, q, k, cos, sin), wanted, strict=True))


def test_the_heads_of_a_position_lie_side_by_side() -> None:
    """In results and gradients, so that neither attention nor a projection's backward pass needs a copy."""
    q, k = states(1, 4, 5, 8), states(1, 2, 5, 8)
    cos, sin = torch.randn(2, 1, 5, 8).unbind()
    assert all(x.transpose(1, 2).is_contiguous() for x in rotary(q, k, cos, sin))
    assert all(x.transpose(1, 2).is_contiguous() for x in passes(rotary, q, k, cos, sin))


def test_the_bits_do_not_depend_on_threads() -> None:
    given = states(1, 4, 600, 64), states(1, 4, 600, 64, seed=1), *torch.randn(2, 1, 600, 64).unbind()
    one, two = (with_threads(n, lambda: passes(rotary, *given)) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_without_memory_it_gives_shapes() -> None:
    q, k = (torch.empty(1, heads, 5, 8, device="meta", requires_grad=True) for heads in (4, 2))
    cos, sin = torch.empty(2, 1, 5, 8, device="meta").unbind()
    torch.stack([x.sum() for x in rotary(q, k, cos, sin)]).sum().backward()
    assert (q.grad.shape, k.grad.shape) == (q.shape, k.shape)
