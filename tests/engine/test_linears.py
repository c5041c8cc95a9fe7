"""Linear layers whose weights autograd does not keep: the same numbers as torch's, and nothing saved but parameters."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gearshift.engine.linears import bind_linears
from gearshift.kernels.weight_sums import keep_sum, sum_for


def passes(layer: nn.Linear, x: Tensor) -> list[Tensor | None]:
    """Output and gradients of a loss with different slopes."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("shape", [(2, 3), (0,), (4,), ()])
def test_it_computes_what_torch_computes(bias: bool, trains: bool, shape: tuple[int, ...]) -> None:
    layer = nn.Linear(7, 5, bias=bias).requires_grad_(trains)
    x = torch.randn(*shape, 7)
    own = passes(layer, x)
    layer.zero_grad()
    bind_linears(layer)
    for expected, found in zip(own, passes(layer, x), strict=True):
        assert (expected is None) == (found is None)
        assert expected is None or torch.equal(expected, found)


def test_autograd_keeps_no_view_of_a_weight() -> None:
    layers = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3, bias=False))
    storages = {p.untyped_storage().data_ptr() for p in layers.parameters()}

    def views() -> int:
        found: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
            layers(torch.randn(2, 4, 7, requires_grad=True))
        return sum(t.untyped_storage().data_ptr() in storages and not isinstance(t, nn.Parameter) for t in found)

    assert views() == 2
    bind_linears(layers)
    assert views() == 0


def test_a_layer_with_a_forward_of_its_own_keeps_it() -> None:
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    bind_linears(nn.ModuleList([layer]))
    assert torch.equal(layer(torch.ones(1, 2)), torch.ones(1, 2))


def rows_of(layer: nn.Embedding, tokens: Tensor) -> list[Tensor]:
    """What the layer gives, and its weight's gradient."""
    layer.zero_grad()
    y = layer(tokens)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    assert layer.weight.grad is not None
    return [y.detach(), layer.weight.grad.clone()]


class Sum:
    """A sum of whole gradients, as `kernels.weight_sums` asks for one."""

    def __init__(self, weight: Tensor):
        self.total, self.times = torch.zeros(weight.shape), 0

    def add_product(self, first: int, left: Tensor, right: Tensor) -> None:
        self.total[first : first + left.shape[1]] += left.t() @ right

    def add_rows(self, rows: Tensor, values: Tensor) -> None:
        self.total.index_add_(0, rows, values)

    def done(self) -> None:
        self.times += 1


@pytest.mark.parametrize("padding", [None, 3])
def test_an_embedding_computes_what_torch_computes(padding: int | None) -> None:
    """The padding token's row has no gradient; where there is a sum, what torch would make joins it."""
    layer, tokens = nn.Embedding(9, 4, padding_idx=padding), torch.tensor([[3, 1, 3], [8, 1, 0]])
    own = rows_of(layer, tokens)
    bind_linears(nn.ModuleList([layer]))
    assert "forward" in vars(layer)
    for expected, found in zip(own, rows_of(layer, tokens), strict=True):
        assert torch.equal(expected, found)
    total = Sum(layer.weight)
    keep_sum(layer.weight, total)
    layer.zero_grad()
    y = layer(tokens)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    assert layer.weight.grad is None
    assert torch.allclose(total.total, own[1])
    assert total.times == 1


@pytest.mark.parametrize("more", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_an_embedding_that_does_more_keeps_its_forward(more: dict[str, Any]) -> None:
    layer = nn.Embedding(9, 4, **more)
    bind_linears(nn.ModuleList([layer]))
    assert "forward" not in vars(layer)


def test_a_gradient_of_another_type_joins_no_sum() -> None:
    layer = nn.Linear(3, 2, bias=False)
    keep_sum(layer.weight, Sum(layer.weight))
    assert sum_for(layer.weight, torch.zeros(1)) is not None
    assert sum_for(layer.weight, torch.zeros(1, dtype=torch.bfloat16)) is None
    assert sum_for(torch.zeros(2)) is None
