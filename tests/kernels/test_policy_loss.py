"""`policy_loss` against its fp64 definition, a by-hand case of its metrics, and its contract's edges, on both paths."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.kernels import losses_triton, policy_loss
from gearshift.kernels.policy_loss import plain
from tests.kernels.devices import PATHS, take

# The package's attribute of this name is the function.
MODULE = importlib.import_module("gearshift.kernels.policy_loss")
B, L = 6, 17


@pytest.fixture(params=PATHS)
def on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device, with the operation taking one of its paths."""
    return take(request.param, MODULE, losses_triton.policy_loss, monkeypatch)


def make(on: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    rng = torch.Generator().manual_seed(0)
    old = torch.randn(B, L, generator=rng) - 2
    new = old + 0.4 * torch.randn(B, L, generator=rng)  # a third of the ratios lie outside 1 ± 0.2
    advantages = torch.randn(B, L, generator=rng)
    mask = torch.arange(L) < torch.tensor([L, 5, 0, 1, 9, 12])[:, None]
    return [tensor.to(on, dtype) for tensor in (new, old, advantages)], mask.to(on)


def run(function: Any, tensors: list[Tensor], mask: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    new = tensors[0].clone().requires_grad_()
    result = function(new, *tensors[1:], mask, tokens=50, **options)
    loss = result if isinstance(result, Tensor) else result.loss
    (3.0 * loss).backward()
    assert new.grad is not None
    return loss.detach(), new.grad


@pytest.mark.parametrize("options", [{}, {"clip": 0.05}, {"dual_clip": 1.5}, {"clip": 0.5, "dual_clip": 1.1}], ids=str)
def test_fp32_matches_the_fp64_definition(on: str, options: dict[str, float]) -> None:
    tensors, mask = make(on)
    loss, grad = run(policy_loss, tensors, mask, **options)
    want, want_grad = run(plain, [t.double() for t in tensors], mask, **options)
    assert abs(loss - want) <= 2e-6
    assert loss.dtype == torch.float32
    assert (grad - want_grad).norm() <= 1e-5 * want_grad.norm()


def test_bf16_inputs_lose_only_the_rounding_of_their_gradient(on: str) -> None:
    tensors, mask = make(on, torch.bfloat16)
    loss, grad = run(policy_loss, tensors, mask)
    want, want_grad = run(plain, [t.double() for t in tensors], mask)
    assert abs(loss - want) <= 2e-6
    assert loss.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    assert (grad - want_grad).norm() <= 2.0**-9 * 1.01 * want_grad.norm()


@pytest.mark.parametrize("dual_clip", [None, 1.3])
def test_gradcheck(dual_clip: float | None) -> None:
    tensors, mask = make("cpu", torch.float64)
    new = tensors[0].requires_grad_()
    for function in (plain, lambda *a, **k: policy_loss(*a, **k).loss):
        assert torch.autograd.gradcheck(
            lambda x, f=function: f(x, *tensors[1:], mask, tokens=50, dual_clip=dual_clip), new
        )


def test_metrics_by_hand(on: str) -> None:
    """Ratios 2, ½, 2, ½ and 1 with advantages 1, 1, −10, −1 and 1; the sixth token is masked."""
    log2 = torch.tensor(2.0, device=on).log()
    new = torch.stack([log2, -log2, log2, -log2, 0 * log2, log2])[None].requires_grad_()
    advantages = torch.tensor([[1.0, 1.0, -10.0, -1.0, 1.0, 1.0]], device=on)
    mask = torch.tensor([[True] * 5 + [False]], device=on)
    old = torch.zeros(1, 6, device=on)
    loss, metrics = policy_loss(new, old, advantages, mask, clip=0.2, dual_clip=1.5, tokens=10)
    # min(2, 1.2), min(½, 0.8), max(min(−20, −12), −15), min(−½, −0.8), 1
    torch.testing.assert_close(loss, torch.tensor(-(1.2 + 0.5 - 15 - 0.8 + 1) / 10, device=on))
    loss.backward()
    torch.testing.assert_close(new.grad, torch.tensor([[0, -0.05, 0, 0, -0.1, 0]], device=on))
    got = {name: float(value) for name, value in metrics.items()}
    kl = 2 * (1 - float(log2)) + 2 * (-0.5 + float(log2))
    assert got == pytest.approx({"tokens": 5, "clipped": 3, "approx_kl": kl, "ratio": 6}, abs=1e-6)
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in metrics.values())


def test_micro_batches_add_up_to_the_minibatch(on: str) -> None:
    tensors, mask = make(on)
    whole = policy_loss(*tensors, mask=mask, tokens=mask.sum())
    parts = [policy_loss(*(t[rows] for t in tensors), mask=mask[rows], tokens=mask.sum())
             for rows in (slice(0, 2), slice(2, 3), slice(3, B))]  # fmt: skip
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss, rtol=0, atol=1e-6)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(sum(p.metrics[name] for p in parts), value, rtol=0, atol=1e-6)


def test_what_masked_tokens_hold_changes_nothing(on: str) -> None:
    tensors, mask = make(on)
    clean = run(policy_loss, tensors, mask), policy_loss(*tensors, mask=mask, tokens=50).metrics
    for junk in (torch.nan, torch.inf, -torch.inf):
        dirty: Any = [t.masked_fill(~mask, junk) for t in tensors]
        (loss, grad), metrics = run(policy_loss, dirty, mask), policy_loss(*dirty, mask=mask, tokens=50).metrics
        assert torch.equal(loss, clean[0][0])
        assert torch.equal(grad, clean[0][1])
        assert metrics == clean[1]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 3)])
def test_without_any_token_the_loss_is_zero(on: str, shape: tuple[int, int]) -> None:
    new = torch.full(shape, torch.nan, device=on, requires_grad=True)
    loss, metrics = policy_loss(new, new, new, torch.zeros(shape, dtype=torch.bool, device=on), tokens=0)
    loss.backward()
    assert loss == 0
    assert new.grad is not None
    assert not new.grad.any()
    assert not any(metrics.values())


def test_extreme_log_probs(on: str) -> None:
    """A ratio that overflows is clipped for A > 0, and counts nothing for A = 0; −inf against −inf is a ratio of 1."""
    new = torch.tensor([[1000.0, 1000.0, -torch.inf, -torch.inf]], device=on, requires_grad=True)
    old = torch.tensor([[0.0, 0.0, 0.0, -torch.inf]], device=on)
    advantages = torch.tensor([[1.0, 0.0, 1.0, 1.0]], device=on)
    loss = policy_loss(new, old, advantages, torch.ones_like(old, dtype=torch.bool), tokens=4).loss
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(-(1.2 + 0 + 0 + 1) / 4, device=on))
    torch.testing.assert_close(new.grad, torch.tensor([[0, 0, 0, -0.25]], device=on))


def test_the_same_bits_twice(on: str) -> None:
    tensors, mask = make(on)
    first, second = run(policy_loss, tensors, mask), run(policy_loss, tensors, mask)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_a_count_that_is_wrongly_zero_stays_visible(on: str) -> None:
    tensors, mask = make(on)
    assert not policy_loss(*tensors, mask=mask, tokens=0).loss.isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.zeros(2, 3)}, "mask must be bool"),
        ({"advantages": torch.zeros(2, 4)}, r"advantages must be \[2, 3\]"),
        ({"old_logprobs": torch.zeros(2, 3, dtype=torch.int64)}, "old_logprobs must be floating point"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1"),
        ({"tokens": torch.ones(2)}, "tokens must be one number"),
        ({"old_logprobs": torch.zeros(2, 3, device="meta")}, "old_logprobs must be on cpu, like mask, got meta"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_readable_errors(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = dict.fromkeys(["logprobs", "old_logprobs", "advantages"], torch.zeros(2, 3))
    good |= {"mask": torch.zeros(2, 3, dtype=torch.bool), "tokens": 1}
    with pytest.raises(ValueError, match=message):
        policy_loss(**(good | change))
