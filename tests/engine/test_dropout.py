"""Residual dropout: on which blocks, how much, and when. In the steps of a model: tests/rlhf/test_sft.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gearshift.engine import World
from gearshift.engine.dropout import ResidualDropout, residual_blocks
from gearshift.engine.loading import build_on_meta
from gearshift.errors import SettingError
from tests.models import FAMILIES, MORE_FAMILIES, SIZES, tiny_config


def one_world() -> World:
    return World(0, 1, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_every_layer_of_every_family_has_its_two_blocks(family: str) -> None:
    from transformers import AutoModelForCausalLM

    model = build_on_meta(AutoModelForCausalLM, tiny_config(family), torch.float32)
    assert len(residual_blocks(model)) == 2 * SIZES["num_hidden_layers"]


def test_layers_of_an_unknown_form_are_refused() -> None:
    with pytest.raises(SettingError, match="where the blocks of a Sequential lie is not known"):
        ResidualDropout(nn.Sequential(nn.Linear(2, 2)), 0.2, 0, one_world())


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Pair(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 10 * self.self_attn(x)[0] + 100 * self.mlp(x)


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return x, "weights"


def test_a_share_of_each_block_s_output_is_dropped_and_the_rest_scaled() -> None:
    """Both blocks, apart from each other; the stream itself is left alone, and so is all outside of a step."""
    model = nn.Module()
    model.layers = nn.ModuleList([Layer()])
    dropping, ones = ResidualDropout(model, 0.2, 7, one_world()), torch.ones(100_000)
    with dropping.on(3):
        first = model.layers[0](ones)
    assert {round(float(v), 3) for v in first.unique()} == {1.0, 13.5, 126.0, 138.5}  # 1 + 12.5 a + 125 b
    attention, feed_forward = ((first % 25) > 10).float(), (first > 100).float()
    for kept in (attention, feed_forward):
        assert float(kept.mean()) == pytest.approx(0.8, abs=0.005)
    assert float((attention * feed_forward).mean()) == pytest.approx(0.64, abs=0.006)
    assert torch.equal(model.layers[0](ones), 111 * ones)
    state = torch.get_rng_state()
    with dropping.on(3):
        assert torch.equal(model.layers[0](ones), first)
    with dropping.on(4):
        assert not torch.equal(model.layers[0](ones), first)
    assert torch.equal(torch.get_rng_state(), state), "nothing else that is random may depend on it"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "olmo2", "glm4", "mixtral", "phi"])
def test_the_stream_itself_is_left_alone(family: str) -> None:
    """Where no layer adds anything, there is nothing to drop; where layers do, there is."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    dropping, tokens = ResidualDropout(model, 0.5, 0, one_world()), torch.arange(3, 11)[None]

    def logits() -> torch.Tensor:
        with torch.no_grad(), dropping.on(1):
            dropped: torch.Tensor = model(tokens).logits
        with torch.no_grad():
            return dropped - model(tokens).logits

    assert logits().abs().max() > 1e-4
    for layer in model.modules():
        if isinstance(layer, nn.ModuleList):
            for parameter in layer.parameters():
                torch.nn.init.zeros_(parameter)
    assert logits().abs().max() == 0


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_blocks_that_return_the_stream_are_refused(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "d_model": 32, "n_layer": 2, "n_layers": 2, "n_head": 4, "n_heads": 4}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    assert residual_blocks(model) == []


def test_what_a_norm_makes_of_a_block_is_dropped_after_it() -> None:
    model = build_on_meta(_causal(), tiny_config("gemma2"), torch.float32)
    assert {type(block).__name__ for block in residual_blocks(model)} == {"Gemma2RMSNorm"}


def _causal() -> type:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM  # type: ignore[no-any-return]
