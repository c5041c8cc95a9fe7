"""Linear layers whose weights autograd does not keep: the same numbers as torch's, and nothing saved but parameters."""

import pytest
import torch
from torch import Tensor, nn

from gearshift.engine.linears import bind_linears


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
