"""rms_norm against its formula in fp64: compiled, by torch and by Triton; rows do not depend on each other."""

from typing import Any

import pytest
import torch

from gearshift.kernels import native, rms_norm, rms_norm_triton
from gearshift.kernels.rms_norm import plain
from tests.kernels.devices import device
from tests.kernels.threads import with_threads


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


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients(norm: Any, x: torch.Tensor, weight: torch.Tensor, slope: torch.Tensor) -> list[torch.Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = norm(x, weight)
    y.backward(slope)
    return [y.detach(), x.grad, weight.grad]


@pytest.mark.parametrize("features", [1, 7, 37, 384])
@pytest.mark.parametrize("rows", [0, 1, 63, 130])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradients_are_those_of_the_formula(features: int, rows: int, offset: float) -> None:
    g = torch.Generator().manual_seed(rows)
    x, slope = (3 * torch.randn(2, rows, features, generator=g, dtype=torch.float64)).unbind()
    weight = torch.randn(features, generator=g, dtype=torch.float64)

    def formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight + offset)

    wanted = gradients(formula, x, weight, slope)
    found = gradients(lambda x, w: rms_norm(x, w, 1e-5, offset), x.float(), weight.float(), slope.float())
    for name, own, want in zip(("y", "x", "weight"), found, wanted, strict=True):
        assert own.dtype == torch.float32
        assert torch.allclose(own.double(), want, rtol=1e-5, atol=2e-5 * (1 if name != "weight" else 10)), name


def test_only_gradients_that_are_asked_for() -> None:
    x, weight = torch.randn(5, 16), torch.randn(16)
    both = gradients(lambda x, w: rms_norm(x, w, 1e-5), x, weight, torch.ones(5, 16))
    for of_x in (True, False):
        own, norm = x.clone().requires_grad_(of_x), weight.clone().requires_grad_(not of_x)
        rms_norm(own, norm, 1e-5).sum().backward()
        assert torch.equal(own.grad if of_x else norm.grad, both[1 if of_x else 2])
        assert (norm if of_x else own).grad is None


def test_huge_rows_and_slopes_from_a_broadcast() -> None:
    """Gradients of a sum, whose slope is one number seen everywhere, where squares are near the end of fp32."""
    x = torch.full((3, 20), 1e17).requires_grad_()
    weight = torch.ones(20, requires_grad=True)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert torch.allclose(weight.grad, torch.full((20,), 3.0))
    assert float(x.grad.abs().max()) < 1e-22


def test_the_bits_do_not_depend_on_threads() -> None:
    x, weight, slope = torch.randn(700, 384), torch.randn(384), torch.randn(700, 384)
    one, two = (with_threads(n, lambda: gradients(lambda x, w: rms_norm(x, w, 1e-6), x, weight, slope)) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_weight_itself_is_kept() -> None:
    """ZeRO-3 frees what it holds after the forward pass, and gathers it again before the backward pass."""
    weight, kept = torch.nn.Parameter(torch.randn(8)), []
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = rms_norm(x, weight, 1e-6)
    assert any(t is weight for t in kept)
    assert sum(t.numel() for t in kept) == x.numel() + weight.numel()
    whole = weight.data
    weight.data = 2 * whole
    y.sum().backward()
    wanted = gradients(lambda x, w: rms_norm(x, w, 1e-6), x.detach(), 2 * whole, torch.ones(3, 8))
    assert torch.equal(x.grad, wanted[1])


def test_without_memory_it_gives_shapes() -> None:
    x = torch.empty(2, 3, 8, device="meta", requires_grad=True)
    weight = torch.nn.Parameter(torch.empty(8, device="meta"))
    rms_norm(x, weight, 1e-6).sum().backward()
    assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)


def test_other_types_have_gradients_through_torch() -> None:
    x, weight = torch.randn(3, 8).bfloat16().requires_grad_(), torch.randn(8).bfloat16().requires_grad_()
    rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.bfloat16
