"""swiglu and its gradients against fp64, at every size of the gate, and where fp32 ends."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.kernels import swiglu
from gearshift.kernels.swiglu import plain
from tests.kernels.threads import with_threads


def passes(own: Any, gate: Tensor, up: Tensor, slope: Tensor) -> list[Tensor]:
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    y = own(gate, up)
    y.backward(slope)
    return [y.detach(), gate.grad, up.grad]


def test_silu_is_exact_to_about_an_ulp() -> None:
    """From where it vanishes to where it is the gate itself; 2.5e-7 is two ulps, of which the division has a part."""
    gate = torch.linspace(-86, 90, 2_000_001)
    wide = gate.double()
    wanted = wide / (1 + (-wide).exp())
    off = (swiglu(gate, torch.ones_like(gate)).double() - wanted).abs()
    assert float((off / wanted.abs().clamp(min=1e-37)).max()) < 2.5e-7


@pytest.mark.parametrize("shape", [(0, 5), (1,), (2, 3, 37), (4097,), (3, 70_001)])
def test_gradients_are_those_of_the_formula(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    given = [scale * torch.randn(shape, generator=g, dtype=torch.float64) for scale in (4, 2, 1)]
    found = passes(swiglu, *(x.float() for x in given))
    for own, want in zip(found, passes(plain, *given), strict=True):
        assert own.dtype == torch.float32
        assert torch.allclose(own.double(), want, rtol=1e-6, atol=2e-6)


def test_where_fp32_ends_it_gives_what_torch_gives() -> None:
    ends = [0.0, -0.0, 1e-40, -88.0, -89.5, -104.0, 88.0, 104.0, 1e38, -1e38, 3e38, torch.inf, -torch.inf, torch.nan]
    gate = torch.tensor(ends * 5)  # several at once, and a rest
    for own, want in zip(
        passes(swiglu, gate, torch.ones_like(gate), torch.ones_like(gate)),
        passes(plain, gate, torch.ones_like(gate), torch.ones_like(gate)),
        strict=True,
    ):
        assert torch.equal(own.isnan(), want.isnan())
        assert torch.allclose(own, want, rtol=1e-6, atol=1e-37, equal_nan=True)
        assert torch.equal(own.signbit() | own.isnan(), want.signbit() | want.isnan())


def test_the_bits_do_not_depend_on_threads() -> None:
    given = torch.randn(3, 200_003).unbind()
    one, two = (with_threads(n, lambda: passes(swiglu, *given)) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_it_keeps_its_inputs_alone() -> None:
    gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        swiglu(gate, up)
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]


def test_inputs_that_are_not_contiguous_and_other_types() -> None:
    gate, up = torch.randn(2, 8, 5).transpose(1, 2).unbind()
    slope = torch.randn(8, 5).t()
    for own, want in zip(passes(swiglu, gate, up, slope), passes(plain, gate, up, slope), strict=True):
        assert torch.allclose(own, want, rtol=1e-5, atol=1e-6)
    half = torch.randn(2, 3).bfloat16()
    assert torch.equal(swiglu(half, half), plain(half, half))


def test_without_memory_it_gives_shapes() -> None:
    gate, up = (torch.empty(2, 3, device="meta", requires_grad=True) for _ in range(2))
    swiglu(gate, up).sum().backward()
    assert gate.grad.shape == up.grad.shape == (2, 3)
