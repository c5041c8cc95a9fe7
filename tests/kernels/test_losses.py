"""What the two clipped losses share: their operators, how tokens are counted, sums over many blocks."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from gearshift import kernels
from gearshift.kernels import losses_triton
from tests.kernels.devices import PATHS, take


@pytest.fixture(params=["policy_loss", "value_loss"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def loss(name: str) -> Any:
    return getattr(kernels, name)


@pytest.fixture(params=PATHS)
def on(request: pytest.FixtureRequest, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device, with the operation taking one of its paths."""
    module = importlib.import_module(f"gearshift.kernels.{name}")
    return take(request.param, module, getattr(losses_triton, name), monkeypatch)


def make(on: str, rows: int = 3, length: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    first, second, third = (torch.randn(rows, length, generator=rng).to(on, dtype) for _ in range(3))
    mask = torch.arange(length) < torch.randint(length + 1, (rows, 1), generator=rng)
    return [first.requires_grad_(), second, third, mask.to(on)]


@pytest.mark.parametrize("options", [{}, {"dual_clip": 1.5}], ids=str)
@pytest.mark.parametrize("counted", [False, True])
def test_the_operator_is_registered_as_it_behaves(on: str, name: str, counted: bool, options: dict[str, float]) -> None:
    """Also for transposed inputs, whose strides the results must not take over."""
    tensors = [tensor.detach().T for tensor in make(on, dtype=torch.bfloat16)]
    tensors[0].requires_grad_()
    dual_clip = [options.get("dual_clip")] if name == "policy_loss" else []
    count = (torch.tensor(9, device=on), 0) if counted else (None, 9)
    torch.library.opcheck(getattr(torch.ops.gearshift, name).default, (*tensors, 0.2, *dual_clip, *count))


def test_the_backward_operator_is_registered_as_it_behaves() -> None:
    args = torch.randn(2, 3), torch.tensor(3.0), torch.bfloat16
    torch.library.opcheck(torch.ops.gearshift.loss_backward.default, args)
    assert torch.ops.gearshift.loss_backward(*args).dtype == torch.bfloat16


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_passes_through(on: str, loss: Any, dynamic: bool) -> None:
    def call(first: Tensor, *others: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        result = loss(first * 2, *others, tokens=9)
        return result.loss, result.metrics

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    found = []
    for function in (call, compiled):
        tensors = make(on)
        value, metrics = function(*tensors)
        value.backward()
        found.append([value, tensors[0].grad, *metrics.values()])
        assert next(iter(metrics)) == "tokens"
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_fake_tensors_pass_through(on: str, loss: Any) -> None:
    real = make(on, dtype=torch.bfloat16)
    want = loss(*real, tokens=9)
    with FakeTensorMode() as mode:
        first, *others = (mode.from_tensor(tensor) for tensor in real)
        value, metrics = loss(first, *others, tokens=torch.tensor(9, device=on))
        value.backward()
    assert first.grad.shape == first.shape
    assert first.grad.dtype == torch.bfloat16
    assert metrics.keys() == want.metrics.keys()
    for fake, one in zip([value, *metrics.values()], [want.loss, *want.metrics.values()], strict=True):
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.dtype, fake.device) == (one.shape, one.dtype, one.device)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64], ids=str)
def test_tokens_as_a_tensor_are_those_of_a_number(on: str, loss: Any, dtype: torch.dtype) -> None:
    tensors = make(on)
    number, tensor = loss(*tensors, tokens=9), loss(*tensors, tokens=torch.tensor(9, dtype=dtype, device=on))
    assert torch.equal(number.loss, tensor.loss)


def test_metrics_are_views_of_one_tensor(on: str, loss: Any) -> None:
    assert len({value.untyped_storage().data_ptr() for value in loss(*make(on), tokens=9).metrics.values()}) == 1


def test_a_second_derivative_is_an_error_and_not_zero(on: str, loss: Any) -> None:
    tensors = make(on)
    value = loss(*tensors, tokens=9).loss * tensors[0].sum()
    (grad,) = torch.autograd.grad(value, tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(grad.sum(), tensors[0])


def test_many_blocks_add_up(name: str, loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks than one step of the last sum takes, the last one partial; transposed inputs; the same bits twice."""
    module = importlib.import_module(f"gearshift.kernels.{name}")
    tensors = [tensor.detach().T for tensor in make("cpu", rows=150, length=1000)]
    want = loss(*tensors, tokens=7)
    on = take("triton", module, getattr(losses_triton, name), monkeypatch)
    tensors = [tensor.to(on) for tensor in tensors]
    got, again = loss(*tensors, tokens=7), loss(*tensors, tokens=7)
    assert torch.equal(got.loss, again.loss)
    assert got.metrics == again.metrics
    torch.testing.assert_close(got.loss.cpu(), want.loss, rtol=1e-6, atol=0)
    for key, value in want.metrics.items():
        torch.testing.assert_close(got.metrics[key].cpu(), value, rtol=1e-6, atol=1e-6 * float(want.metrics["tokens"]))
        assert not key.startswith(("tokens", "clipped")) or got.metrics[key] == value
