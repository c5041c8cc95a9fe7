"""LoRA (Hu et al. 2021, arXiv 2106.09685) by the `peft` library, on a model that ZeRO-3 has cut.

A layer with an adapter computes x W^T + scale · x A^T B^T; only A and B train. Gearshift's own part: the adapters are
added after the model's weights are cut, so that loading stays what it is; rollouts get W + scale · B A, merged on the
flat shards; and with the adapters off the policy is its own reference.

Letters: r rank of an adapter, I features in, O features out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gearshift.engine.settings import LoraSettings
from gearshift.errors import SettingError, one_line

NAME = "default"  # peft's, of the one adapter that a layer has here


@dataclass(frozen=True)
class Adapter:
    """One layer's: `layer` the name that its weight has without adapters (such as "model.layers.0.mlp.up_proj")."""

    layer: str
    module: Any

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A `[r, I]` and B `[O, r]`, as ZeRO-3 holds them."""
        return self.module.lora_A[NAME].weight, self.module.lora_B[NAME].weight

    @property
    def scale(self) -> float:
        return float(self.module.scaling[NAME])


def add_adapters(module: Any, settings: LoraSettings, seed: int) -> list[nn.Parameter]:
    """Adapters beside the Linear layers that `settings.targets` names, in place. Their parameters, not cut yet.

    A starts as `peft` starts it and B at 0, so that the model is at first what it was; the same from `seed` for any
    number of ranks. Raises SettingError (`policy.lora`): no peft, no such layer, a layer of another kind.
    """
    inject, config = _peft(settings)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        inject(config, module, adapter_name=NAME)
    except Exception as error:  # no layer of that name, a kind of layer that has no LoRA: each raises its own type
        raise SettingError("policy.lora.targets", one_line(error)) from error
    finally:
        torch.set_rng_state(state)
    module.lora = settings
    adapters = list(adapters_of(module))
    for adapter in adapters:
        _check_kind(adapter)
    return [factor for adapter in adapters for factor in adapter.factors]


def _peft(settings: LoraSettings) -> tuple[Any, Any]:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise SettingError("policy.lora", 'this needs peft: pip install "gearshift[lora]"') from error
    return inject_adapter_in_model, peft_config(LoraConfig, settings)


def peft_config(kind: Any, settings: LoraSettings) -> Any:
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    return kind(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, lora_dropout=0.0, bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip


def _check_kind(adapter: Adapter) -> None:
    base = adapter.module.get_base_layer()
    if not isinstance(base, nn.Linear):
        raise SettingError(
            "policy.lora.targets", f"{adapter.layer} is a {type(base).__name__}; adapters go beside Linear layers"
        )


def adapters_of(module: nn.Module) -> Iterator[Adapter]:
    """In the model's order; none for a model without."""
    for name, layer in module.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "get_base_layer"):
            yield Adapter(name, layer)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return ".lora_A." in name or ".lora_B." in name


def plain_name(name: str) -> str:
    """The name that a parameter has in the model without adapters."""
    return name.replace(".base_layer.", ".")


def train_adapters_only(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(is_adapter(name))


@torch.no_grad()
def merged_weights(module: nn.Module, own: Mapping[str, Tensor], rank: int) -> Iterator[tuple[str, Tensor]]:
    """The weights that have an adapter, under plain names, with it added: flat, new tensors. Collective.

    Of a name in `own` (ZeRO-3's shards of this rank) only that shard: each rank forms only the rows of B A that lie in
    it, in fp32, and rounds the sum once. Of all others, which ZeRO-3 keeps whole, the whole.
    """
    import deepspeed

    for adapter in adapters_of(module):
        name, weight = f"{adapter.layer}.weight", adapter.module.get_base_layer().weight
        with deepspeed.zero.GatheredParameters(list(adapter.factors)):
            if name in own:
                shard = own[name]
                a, b = (factor.to(shard.device) for factor in adapter.factors)
                yield name, _merged(shard, a, b, adapter.scale, rank * shard.numel())
            else:
                yield name, merged_by_shards(weight.data, *adapter.factors, adapter.scale, dist.get_world_size())


@torch.no_grad()
def merged_whole(adapter: Adapter) -> Tensor:
    """The merged weight `[O, I]` on the host. Collective."""
    import deepspeed

    weight = adapter.module.get_base_layer().weight
    with deepspeed.zero.GatheredParameters([weight, *adapter.factors]):
        merged = merged_by_shards(weight, *adapter.factors, adapter.scale, dist.get_world_size())
        return merged.view(weight.shape).cpu()


def merged_by_shards(weight: Tensor, a: Tensor, b: Tensor, scale: float, ranks: int) -> Tensor:
    """A whole weight `[O, I]` merged, flat: cut as ZeRO-3 cuts it over `ranks`, since a product of other sizes could
    round otherwise. A `[r, I]` and B `[O, r]` are of the weight's type."""
    flat = weight.reshape(-1)
    size = -(-len(flat) // ranks)
    return torch.cat([_merged(shard, a, b, scale, number * size) for number, shard in enumerate(flat.split(size))])


def _merged(shard: Tensor, a: Tensor, b: Tensor, scale: float, low: int) -> Tensor:
    """A flat shard of W `[O, I]` that begins at element `low`, and what of scale · B A lies there."""
    features, numel = a.shape[1], a.shape[1] * b.shape[0]
    high = min(low + shard.numel(), numel)  # the last shards are padded
    if low >= high:
        return shard.clone()
    first, last = low // features, -(-high // features)
    delta = (scale * (b[first:last].float() @ a.float())).flatten()[low - first * features :][: high - low]
    out = shard.float()
    out = torch.cat([out[: high - low] + delta, out[high - low :]])
    return out.to(shard.dtype)


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """The model that the adapters were added to, for a while."""
    layers = [adapter.module for adapter in adapters_of(module)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
