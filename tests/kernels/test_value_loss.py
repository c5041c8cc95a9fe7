"""`value_loss` against its fp64 definition, a by-hand case of its metrics, and its contract's edges, on both paths."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.kernels import losses_triton, value_loss
from gearshift.kernels.value_loss import plain
from tests.kernels.devices import PATHS, take

# The package's attribute of this name is the function.
MODULE = importlib.import_module("gearshift.kernels.value_loss")
B, L = 6, 17


@pytest.fixture(params=PATHS)
def on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device, with the operation taking one of its paths."""
    return take(request.param, MODULE, losses_triton.value_loss, monkeypatch)


def make(on: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    rng = torch.Generator().manual_seed(0)
    old = torch.randn(B, L, generator=rng)
    new = old + 0.3 * torch.randn(B, L, generator=rng)  # half of the moves are wider than 0.2
    returns = torch.randn(B, L, generator=rng)
    mask = torch.arange(L) < torch.tensor([L, 5, 0, 1, 9, 12])[:, None]
    return [tensor.to(on, dtype) for tensor in (new, old, returns)], mask.to(on)


def run(function: Any, tensors: list[Tensor], mask: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    new = tensors[0].clone().requires_grad_()
    result = function(new, *tensors[1:], mask, tokens=50, **options)
    loss = result if isinstance(result, Tensor) else result.loss
    (3.0 * loss).backward()
    assert new.grad is not None
    return loss.detach(), new.grad


@pytest.mark.parametrize("clip", [0.2, 0.01, 10.0])
def test_fp32_matches_the_fp64_definition(on: str, clip: float) -> None:
    tensors, mask = make(on)
    loss, grad = run(value_loss, tensors, mask, clip=clip)
    want, want_grad = run(plain, [t.double() for t in tensors], mask, clip=clip)
    assert abs(loss - want) <= 2e-6
    assert loss.dtype == torch.float32
    assert (grad - want_grad).norm() <= 1e-5 * want_grad.norm()


def test_bf16_inputs_lose_only_the_rounding_of_their_gradient(on: str) -> None:
    tensors, mask = make(on, torch.bfloat16)
    loss, grad = run(value_loss, tensors, mask)
    want, want_grad = run(plain, [t.double() for t in tensors], mask)
    assert abs(loss - want) <= 2e-6
    assert loss.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    assert (grad - want_grad).norm() <= 2.0**-9 * 1.01 * want_grad.norm()


def test_gradcheck() -> None:
    tensors, mask = make("cpu", torch.float64)
    new = tensors[0].requires_grad_()
    for function in (plain, lambda *a, **k: value_loss(*a, **k).loss):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, *tensors[1:], mask, tokens=50), new)


def test_metrics_by_hand(on: str) -> None:
    """From 0: a small step, a big step toward the return (clipped), a big step past it (not clipped); one masked."""
    new = torch.tensor([[0.1, 1.0, 1.0, 9.0]], device=on, requires_grad=True)
    returns = torch.tensor([[1.0, 2.0, -1.0, 9.0]], device=on)
    mask = torch.tensor([[True, True, True, False]], device=on)
    loss, metrics = value_loss(new, torch.zeros(1, 4, device=on), returns, mask, clip=0.2, tokens=10)
    torch.testing.assert_close(loss, torch.tensor(0.5 * (0.9**2 + 1.8**2 + 2**2) / 10, device=on))
    loss.backward()
    torch.testing.assert_close(new.grad, torch.tensor([[-0.09, 0, 0.2, 0]], device=on))
    got = {name: float(value) for name, value in metrics.items()}
    want = {"tokens": 3, "clipped": 1, "returns": 2, "returns_sq": 6, "error": -0.1, "error_sq": 0.81 + 1 + 4}
    assert got == pytest.approx(want, abs=1e-6)
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in metrics.values())


def test_metrics_give_the_explained_variance(on: str) -> None:
    tensors, mask = make(on)
    m = {name: float(value) for name, value in value_loss(*tensors, mask=mask, tokens=50).metrics.items()}
    n = m["tokens"]
    got = 1 - (m["error_sq"] / n - (m["error"] / n) ** 2) / (m["returns_sq"] / n - (m["returns"] / n) ** 2)
    values, _, returns = (t[mask].double() for t in tensors)
    assert got == pytest.approx(float(1 - (returns - values).var() / returns.var()), abs=1e-6)


def test_values_that_moved_little_are_not_clipped(on: str) -> None:
    """v_old + (v − v_old) is not v in fp32: rounding must not count as clipping."""
    tensors, mask = make(on)
    tensors[0], tensors[1] = 0.01 * tensors[0].tanh(), 0.18 * tensors[1].tanh()
    assert ((tensors[1] + (tensors[0] - tensors[1])) != tensors[0])[mask].any()
    assert value_loss(*tensors, mask=mask, tokens=50).metrics["clipped"] == 0


def test_micro_batches_add_up_to_the_minibatch(on: str) -> None:
    tensors, mask = make(on)
    whole = value_loss(*tensors, mask=mask, tokens=mask.sum())
    parts = [value_loss(*(t[rows] for t in tensors), mask=mask[rows], tokens=mask.sum())
             for rows in (slice(0, 2), slice(2, 3), slice(3, B))]  # fmt: skip
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss, rtol=0, atol=1e-6)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(sum(p.metrics[name] for p in parts), value, rtol=0, atol=1e-6)


def test_what_masked_tokens_hold_changes_nothing(on: str) -> None:
    tensors, mask = make(on)
    clean = run(value_loss, tensors, mask), value_loss(*tensors, mask=mask, tokens=50).metrics
    for junk in (torch.nan, torch.inf, -torch.inf):
        dirty: Any = [t.masked_fill(~mask, junk) for t in tensors]
        (loss, grad), metrics = run(value_loss, dirty, mask), value_loss(*dirty, mask=mask, tokens=50).metrics
        assert torch.equal(loss, clean[0][0])
        assert torch.equal(grad, clean[0][1])
        assert metrics == clean[1]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 3)])
def test_without_any_token_the_loss_is_zero(on: str, shape: tuple[int, int]) -> None:
    new = torch.full(shape, torch.nan, device=on, requires_grad=True)
    loss, metrics = value_loss(new, new, new, torch.zeros(shape, dtype=torch.bool, device=on), tokens=0)
    loss.backward()
    assert loss == 0
    assert new.grad is not None
    assert not new.grad.any()
    assert not any(metrics.values())


def test_the_same_bits_twice(on: str) -> None:
    tensors, mask = make(on)
    first, second = run(value_loss, tensors, mask), run(value_loss, tensors, mask)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.zeros(2, 3)}, "mask must be bool"),
        ({"returns": torch.zeros(2, 4)}, r"returns must be \[2, 3\]"),
        ({"old_values": torch.zeros(2, 3, dtype=torch.int64)}, "old_values must be floating point"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"tokens": torch.ones(2)}, "tokens must be one number"),
        ({"old_values": torch.zeros(2, 3, device="meta")}, "old_values must be on cpu, like mask, got meta"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_readable_errors(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = dict.fromkeys(["values", "old_values", "returns"], torch.zeros(2, 3))
    good |= {"mask": torch.zeros(2, 3, dtype=torch.bool), "tokens": 1}
    with pytest.raises(ValueError, match=message):
        value_loss(**(good | change))
