"""Layers of one input that are computed together, against each by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gearshift.engine import CausalModel, Training, World
from gearshift.engine import siblings as together
from gearshift.engine.linears import bind_linears
from gearshift.engine.siblings import bind_siblings
from tests.engine.test_zero import ROWS, _gradient, distance, language_loss, token_batch
from tests.models import save_tiny
from tests.worker_group import WorkerGroup

# Else so small a model's weights are kept whole, each by itself.
CUT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


class Block(nn.Module):
    """Heads of 2, 1 and 1, from one tensor or, asked for keys of another, from two."""

    def __init__(self, bias: bool = False):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, n, bias=bias) for n in (32, 16, 16))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        keys = x if other is None else other
        q, k, v = self.q_proj(x), self.k_proj(keys), self.v_proj(keys)
        return torch.cat([q, 2 * k, 3 * v], -1)


def side_by_side(block: Block) -> None:
    """In memory, as a model's weights are once they are gathered."""
    layers = [block.q_proj, block.k_proj, block.v_proj]
    joined = torch.cat([layer.weight.detach() for layer in layers])
    for layer, part in zip(layers, joined.split([len(layer.weight) for layer in layers]), strict=True):
        layer.weight.data = part


def passes(block: Block, *inputs: Tensor) -> list[Tensor]:
    """The result, and gradients of inputs and weights."""
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    y = block(*inputs)
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y.detach(), *torch.autograd.grad(y, [*inputs, *block.parameters()], slope)]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each product was of."""
    seen: list[int] = []
    own = together._Together.apply

    def apply(x: Tensor, joins: bool, *weights: Tensor) -> Any:
        seen.append(1 if joins and together._side_by_side(weights) is not None else len(weights))
        return own(x, joins, *weights)

    monkeypatch.setattr(together._Together, "apply", apply)
    return seen


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("adjacent", [False, True])
def test_one_product_or_three(counted: list[int], bound: bool, adjacent: bool) -> None:
    """Where weights lie side by side it is one."""
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 5, 16)
    if adjacent:
        side_by_side(block)
    alone = passes(block, x)
    if bound:
        bind_linears(block)
    bind_siblings(block)
    for _ in range(2):
        for own, other in zip(passes(block, x), alone, strict=True):
            assert torch.allclose(own, other, rtol=1e-5, atol=1e-5)
    assert counted == [1 if adjacent else 3] * 2


def test_frozen_weights_have_no_gradient(counted: list[int]) -> None:
    block, x = Block().requires_grad_(False), torch.randn(3, 16, requires_grad=True)
    alone = torch.autograd.grad(block(x).sum(), x)[0]
    bind_siblings(block)
    assert torch.allclose(torch.autograd.grad(block(x).sum(), x)[0], alone, atol=1e-6)
    with torch.no_grad():
        assert block(x).grad_fn is None
    assert counted == [3, 3]


def test_layers_of_several_inputs_go_back_to_their_own(counted: list[int]) -> None:
    """Queries of one tensor, keys and values of another: found out once, right from the start."""
    torch.manual_seed(0)
    block, x, other = Block(), torch.randn(4, 16), torch.randn(4, 16)
    alone = passes(block, x, other)
    bind_siblings(block)
    for _ in range(3):
        for own, found in zip(alone, passes(block, x, other), strict=True):
            assert torch.allclose(own, found, atol=1e-5)
    assert counted == [3]


def test_what_is_not_plain_stays() -> None:
    """With biases, with a forward or a hook of their own."""
    hooked, own, biased = Block(), Block(), Block(bias=True)
    hooked.k_proj.register_forward_hook(lambda *_: None)
    own.v_proj.forward = lambda x: x  # type: ignore[method-assign]
    for block in (hooked, own, biased):
        bind_siblings(block)
        assert "forward" not in vars(block.q_proj)


def of_a_model(
    world: World, folder: str, joined: bool, again: bool
) -> tuple[list[int], list[float], dict[str, Tensor]]:
    """Weights of each product, losses and gradients."""
    import gearshift.engine.zero as zero

    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        if not joined:
            patch.setattr(zero, "bind_siblings", lambda module: None)
        own = together._Together.apply
        patch.setattr(
            together._Together,
            "apply",
            lambda x, joins, *w: (seen.append(1 if joins and together._side_by_side(w) is not None else len(w)),
                                  own(x, joins, *w))[1],
        )  # fmt: skip
        training = Training(learning_rate=0.1, optimizer="sgd", gradient_checkpointing=again)
        model = CausalModel.load(
            folder, world, dtype=torch.float32, micro_batch_size=ROWS, training=training, deepspeed_extra=CUT
        )
        assert model.packs
        seen.clear()
        loss = float(model.accumulate(language_loss, token_batch().select(world.share(ROWS)))["loss"])
        return seen, [loss], {n: _gradient(p) for n, p in model.module.named_parameters()}


def of_a_frozen_model(world: World, folder: str) -> tuple[bool, float]:
    """Whether its projections are one product, and by how much its hidden states differ without that."""
    import gearshift.engine.zero as zero

    tokens, found = torch.arange(20).view(2, 10), []
    for bind in (zero.bind_siblings, lambda module: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(zero, "bind_siblings", bind)
            model = CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=2)
            found.append(model.hidden_states(tokens))
            if len(found) == 1:
                attention = model.module.base_model.layers[1].self_attn
                layers = attention.q_proj, attention.k_proj, attention.v_proj
                joined = together._side_by_side(tuple(layer.weight for layer in layers)) is not None
    return joined, float((found[0] - found[1]).abs().max())


def test_weights_of_a_frozen_model_are_laid_side_by_side(one_rank: WorkerGroup, tmp_path: Path) -> None:
    joined, gap = one_rank.run(of_a_frozen_model, str(save_tiny("llama", tmp_path / "llama")))[0]
    assert joined
    assert gap <= 1e-5


@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks"])
@pytest.mark.parametrize("again", [False, True])
def test_a_models_gradients_are_the_same(
    request: pytest.FixtureRequest, tmp_path: Path, ranks: str, again: bool
) -> None:
    """Attention in one product, the gate and what it opens in two; once more where activations are computed again."""
    folder, group = str(save_tiny("llama", tmp_path / "llama")), request.getfixturevalue(ranks)
    seen, losses, gradients = group.run(of_a_model, folder, True, again)[0]
    none, alone, right = group.run(of_a_model, folder, False, again)[0]
    assert none == []
    assert seen == [1, 2] * 2 * (2 if again else 1)
    assert losses == pytest.approx(alone, rel=1e-6)
    assert distance(gradients, right) <= 2e-6
