"""Residual dropout for models that have none: on what each attention and feed-forward block adds to the stream.

Radford et al. (GPT) call it so; GPT-2's own `resid_pdrop` sits in the same places. Every model is loaded with its own
dropout off (`engine.loading`), so this is the only one, whatever the family.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from gearshift.engine.distributed import World
from gearshift.errors import SettingError

# What the blocks of a decoder layer are called, over the families of `transformers`.
ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "mamba", "mixer")
# Of layers that normalise what a block gives before they add it: the norm's output is what is added.
POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)
FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe", "moe", "fc2", "ffn", "feedforward")


class ResidualDropout:
    """Hooks on a model's blocks that drop outputs, scaled by 1 / (1 − rate), inside of `on` alone.

    Which ones depends on (seed, optimizer step, rank), never on what ran before: a resumed run drops the same.
    """

    def __init__(self, module: nn.Module, rate: float, seed: int, world: World):
        """Raises SettingError when the model's layers are not of a known form."""
        self.rate, self.seed, self.world = rate, seed, world
        self._active = False
        blocks = residual_blocks(module)
        if not blocks:
            raise SettingError(
                "train.residual_dropout",
                f"where the blocks of a {type(module).__name__} lie is not known: set it to 0",
            )
        for block in blocks:
            block.register_forward_hook(self._drop)

    @contextmanager
    def on(self, step: int) -> Iterator[None]:
        """Drop during optimizer step `step`: forward, backward and what the backward computes again."""
        device = self.world.device
        text = f"{self.seed} {step} {self.world.rank}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=_kind(device)):
            torch.manual_seed(seed)
            self._active = True
            try:
                yield
            finally:
                self._active = False

    def _drop(self, block: nn.Module, inputs: Any, output: Any) -> Any:
        if not self._active:
            return None
        if isinstance(output, Tensor):
            return dropout(output, self.rate)
        return (dropout(output[0], self.rate), *output[1:])  # attention gives its weights as well, experts their router


def residual_blocks(module: nn.Module) -> list[nn.Module]:
    """What adds to the stream in every decoder layer, two for each; none where some layer is of another form."""
    found: list[nn.Module] = []
    for layers in module.modules():
        if not isinstance(layers, nn.ModuleList):
            continue
        pairs = [_blocks(layer) for layer in layers]
        if any(pair for pair in pairs):
            if not all(len(pair) == 2 for pair in pairs):
                return []
            found += [block for pair in pairs for block in pair]
    return found


def _blocks(layer: nn.Module) -> list[nn.Module]:
    """What gives the two terms that a layer adds to its stream; fewer or more than two where that is not known."""
    children = dict(layer.named_children())
    attention = [children[name] for name in ATTENTION if name in children]
    if not attention:
        return []
    for names in POST_NORMS:
        if all(name in children for name in names):
            return [children[name] for name in names]
    feed_forward = [children[name] for name in FEED_FORWARD if name in children][:1]
    # BLOOM's and MPT's blocks are given the stream and return it with their term added.
    return [
        block for block in (*attention, *feed_forward) if "residual" not in inspect.signature(block.forward).parameters
    ]


def _kind(device: torch.device) -> str:
    """`fork_rng` looks for the module of a device even where it is given none of them."""
    return "cuda" if device.type == "cpu" else device.type
