"""The rollout model: the same `transformers` class, each parallel layer holding this rank's slice.

Parallelism is applied from outside: the model is built on the meta device, every parameter points into a buffer that
the shift writes, and the layers that the layout names get a forward that sums over the tensor-parallel group.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gearshift.engine.attention_check import check_attention
from gearshift.engine.cache import ATTENTION_NAME, KeyValueCache, register
from gearshift.engine.decoder import Decoder, Recorder
from gearshift.engine.fused import bind_norm
from gearshift.engine.heads import LogitTransform, backbone_of, lm_head_of
from gearshift.engine.layout import TensorParallelLayout, is_plain_linear
from gearshift.engine.loading import build_on_meta
from gearshift.engine.parallel_layers import bind_shares, bind_silu
from gearshift.engine.rotary import bind_rotary
from gearshift.engine.sampling import HeadShard
from gearshift.engine.tensor_parallel import TensorParallelGroup
from gearshift.engine.weights import persistent_buffers
from gearshift.kernels import FlashKernel, decode_step, few_rows_linear


class Replica:
    """This rank's part of one tensor-parallel copy of a causal LM.

    `slices`: parameter name -> its slice, at an address that does not change; `stamp`: which weights they hold (see
    `ZeroModel.stamp`; None: none). `decoder` runs the steps of decoding: recorded by a `recorder`, if one is given, and
    with `flash` as their attention. `weights`: the slices, where somebody else has them already.
    """

    def __init__(
        self,
        config: Any,
        group: TensorParallelGroup,
        dtype: torch.dtype,
        device: torch.device,
        recorder: type[Recorder] | None = None,
        flash: FlashKernel | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ):
        from transformers import AutoModelForCausalLM

        register()
        config = copy.deepcopy(config)
        config._attn_implementation = ATTENTION_NAME
        self.stamp: tuple[int, bool] | None = None
        self.group = group
        self._dtype, self._device = dtype, device
        self.cache = KeyValueCache(rotary_limit(config), 1 if recorder is None else recorder.block, flash)
        self.decoder = Decoder(self, device, recorder)
        self.model = build_on_meta(AutoModelForCausalLM, config, dtype)
        self.layout = TensorParallelLayout.of(self.model, group.size)
        self.shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        self.slices = self._allocate(device, weights)
        self.model.to(device).eval()
        self.head = self._head_shard()
        self._bind()
        with torch.no_grad():
            if device.type != "meta":  # on paper: nothing to run
                check_attention(self.model, self.hidden, device)

    def hidden(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions [n, T] -> last hidden states [n, T, H]; keys and values go to the cache."""
        hidden: Tensor = backbone_of(self.model)(input_ids=tokens, position_ids=positions, use_cache=False)[0]
        return hidden

    def take_buffers(self, module: nn.Module) -> None:
        """Copy what belongs to the model's weights and is no parameter, so that the shift does not bring it."""
        own = dict(self.model.named_buffers())
        for name, buffer in persistent_buffers(module):
            own[name].copy_(buffer)

    def _allocate(self, device: torch.device, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        names = {id(p): name for name, p in self.model.named_parameters()}
        slices: dict[str, Tensor] = {}
        made: dict[str, nn.Parameter] = {}
        for module in self.model.modules():
            for attribute, meta in list(module.named_parameters(recurse=False)):
                name = names[id(meta)]
                if name not in made:
                    shape = self.layout.splits[name].shape(self.shapes[name], self.group.rank)
                    own = torch.zeros(shape, dtype=meta.dtype, device=device) if weights is None else weights[name]
                    assert own.shape == shape
                    slices[name] = own
                    made[name] = nn.Parameter(slices[name], requires_grad=False)
                module._parameters[attribute] = made[name]
        return slices

    def _head_shard(self) -> HeadShard:
        head = lm_head_of(self.model)
        start = self.layout.vocabulary[self.group.rank][0]
        return HeadShard(head.weight, head.bias, start, LogitTransform.of(self.model.config))

    def _bind(self) -> None:
        for name, module in self.model.named_modules():
            if hasattr(module, "layer_idx"):
                module.rollout_cache = self.cache
            role = self.layout.roles.get(name)
            if role == "embedding":
                self._bind_embedding(module)
            elif role == "row":
                self._bind_row(module)
            elif is_plain_linear(module):
                _bind_linear(module)
            elif role is None:
                bind_norm(module, decode_step.norm)
                bind_silu(module)
        bind_shares(self.model, self.layout, self.group)
        if self._device.type == "cuda":
            bind_rotary(self.model, self._dtype, self._device)

    def _bind_row(self, module: nn.Module) -> None:
        group = self.group

        def forward(self: nn.Linear, x: Tensor) -> Tensor:
            y = group.all_reduce(few_rows_linear(x, _matrix(self)))
            return y if self.bias is None else y + self.bias

        module.forward = types.MethodType(forward, module)

    def _bind_embedding(self, module: nn.Module) -> None:
        group, start, own_forward = self.group, self.head.vocab_start, module.forward
        if group.size == 1:
            return

        def forward(self: nn.Embedding, tokens: Tensor) -> Tensor:
            local = tokens - start
            mine = (local >= 0) & (local < self.weight.shape[0])
            # The class's own forward: Gemma scales its embeddings there.
            rows = own_forward(local.clamp(0, self.weight.shape[0] - 1))
            return group.all_reduce(rows * mine[..., None])

        module.forward = types.MethodType(forward, module)


def _bind_linear(module: nn.Module) -> None:
    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return few_rows_linear(x, _matrix(self), self.bias)

    module.forward = types.MethodType(forward, module)


def _matrix(layer: nn.Module) -> Tensor:
    """The weight as [outputs, inputs]."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.t() if isinstance(layer, Conv1D) else weight


def rotary_limit(config: Any) -> int | None:
    """The positions up to which rotary embeddings do not depend on the longest row of a batch (None: they never do).

    "longrope" has other frequencies for all positions of a row past its original length, "dynamic" grows with it: keys
    that are cached already would be wrong.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = list(rope.values()) if rope and all(isinstance(kind, dict) for kind in rope.values()) else [rope]
    limits = [
        kind.get("original_max_position_embeddings", text.max_position_embeddings)
        for kind in kinds
        if kind.get("rope_type") in ("longrope", "dynamic")
    ]
    return min(limits, default=None)
