"""Models that come into being already cut over the ranks: from a folder or from nothing, one module at a time.

The model is built on the meta device. Then each module's own parameters are made real, filled on rank 0 (read from
a safetensors file, or initialised by the model's own rule), broadcast and cut by ZeRO-3, before the next module's.
No device ever holds the whole model; rank 0's host holds one module beside its shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gearshift.engine.distributed import World
from gearshift.errors import UserError

# Computed, not learned, and once saved all the same by older versions of `transformers`.
_BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")


def build_on_meta(auto_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """The model with parameters on the meta device and real buffers (`inv_freq` and the like are computed)."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = auto_class.from_config(config, dtype=dtype)
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            # Padding is masked by lengths here. Torch would keep the row of the pad token from learning (a pad equal
            # to EOS is a token like any other) and look for it in a slice of the vocabulary that lacks it.
            module.padding_idx = None
    return model


class SafetensorsFolder:
    """The weights of a `save_pretrained` folder, read one tensor at a time under the names of the given model.

    `transformers`' own renamings are applied (GPT-NeoX files hold `embed_out` where the module is `lm_head`).
    """

    def __init__(self, folder: Path, model: Any):
        self.folder = folder
        self._file_of = self._names(model)
        self._open: tuple[str, Any] = ("", None)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str) -> Tensor:
        file, key = self._file_of[name]
        if self._open[0] != file:
            self._open = (file, safe_open(self.folder / file, framework="pt"))
        tensor: Tensor = self._open[1].get_tensor(key)
        return tensor

    def check(self, model: nn.Module, may_be_missing: Iterable[str] = ()) -> None:
        """Every parameter is there, with the shape that the config says, or UserError names the first that is not."""
        allowed = set(may_be_missing)
        for path, parameter in model.named_parameters():
            if path not in self:
                if path not in allowed:
                    raise UserError(f"{self.folder}: the weights lack {path}")
                continue
            file, key = self._file_of[path]
            with safe_open(self.folder / file, framework="pt") as opened:
                shape = list(opened.get_slice(key).get_shape())
            if shape != list(parameter.shape):
                raise UserError(
                    f"{self.folder}: {path} has shape {shape}, the model's config says {list(parameter.shape)}"
                )
        known = set(model.state_dict(keep_vars=True)) | {name for name, _ in model.named_buffers()}
        heads = ("lm_head.", "score.", "embed_out.") if allowed else ()  # the head of what the backbone is taken from
        left = [name for name in self._file_of if name not in known and not name.startswith(heads)]
        left = [name for name in left if not name.endswith(_BUFFERS)]
        if left:
            raise UserError(
                f"{self.folder}: {left[0]} has no place in a {type(model).__name__} ({len(left)} such weights)"
            )

    def _names(self, model: Any) -> dict[str, tuple[str, str]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        own = model.state_dict()
        names = {}
        for key, file in self._files().items():
            name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
            if converted is not None:
                raise UserError(
                    f"{self.folder}: {key} must be merged with other tensors to become {name}, which is not supported "
                    "yet for this architecture"
                )
            names[name] = (file, key)
        return names

    def _files(self) -> dict[str, str]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return weight_map
        single = self.folder / "model.safetensors"
        if not single.exists():
            raise UserError(f"{self.folder}: no model.safetensors (or .index.json) in this folder")
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single.name)


def materialise(
    model: nn.Module,
    world: World,
    *,
    folder: Path | None,
    may_be_missing: Iterable[str] = (),
    seed: int = 0,
    offload: dict[str, Any] | None = None,
) -> None:
    """Fill every parameter and cut it by ZeRO-3, module by module. Collective.

    `folder` None: all is initialised by the model's own rule, from `seed`, the same for any number of ranks.
    `may_be_missing`: parameters that are initialised when the folder lacks them (a new value head).
    `offload`: DeepSpeed's `zero_optimization.offload_param` section.
    Raises UserError on every rank for a missing parameter or a wrong shape. Only rank 0 reads the folder.
    """
    allowed = set(may_be_missing)
    source: SafetensorsFolder | None = None
    with world.main_first():
        if world.is_main and folder is not None:
            source = SafetensorsFolder(folder, model)
            source.check(model, allowed)
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    converted: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(world.device)  # DeepSpeed places parameters, not these
        own = _make_real(module, converted)
        if not own:
            continue
        if world.is_main:
            _fill(model, module, prefix, own, source if folder is not None else None, allowed)
        _partition(own, offload or {})
    torch.set_rng_state(generator_state)


def _make_real(module: nn.Module, converted: dict[int, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Replace a module's own meta parameters; returns the new ones. A tied parameter stays one parameter."""
    new = {}
    for name, meta in list(module.named_parameters(recurse=False)):
        if id(meta) not in converted:
            new[name] = nn.Parameter(torch.empty(meta.shape, dtype=meta.dtype), requires_grad=meta.requires_grad)
            converted[id(meta)] = new[name]
        module._parameters[name] = converted[id(meta)]
    return new


@torch.no_grad()
def _fill(
    model: Any,
    module: nn.Module,
    prefix: str,
    own: dict[str, nn.Parameter],
    source: SafetensorsFolder | None,
    may_be_missing: set[str],
) -> None:
    """Fill the own parameters of one module (called on rank 0 only)."""
    paths = {name: f"{prefix}.{name}" if prefix else name for name in own}
    if source is None or any(path in may_be_missing and path not in source for path in paths.values()):
        model._init_weights(module)
    if source is not None:
        for name, path in paths.items():
            if path in source:
                own[name].copy_(source.read(path))


def _partition(own: dict[str, nn.Parameter], offload: dict[str, Any]) -> None:
    """Rank 0's values to all ranks, and each parameter cut in equal contiguous shards. Collective."""
    import deepspeed

    holder = nn.Module()
    for name, parameter in own.items():
        holder.register_parameter(name, parameter)
    deepspeed.zero.Init(
        module=holder,
        mem_efficient_linear=False,
        remote_device=offload.get("device"),
        pin_memory=bool(offload.get("pin_memory", False)),
        dtype=next(iter(own.values())).dtype,
    )


def load_module(
    auto_class: Any,
    init: str,
    world: World,
    dtype: torch.dtype,
    *,
    config: Any = None,
    may_be_missing: Callable[[nn.Module], list[str]] = lambda module: [],
    seed: int = 0,
    deepspeed_extra: dict[str, Any] | None = None,
) -> Any:
    """A ZeRO-3-cut `transformers` module from a folder or hub name, or (with `init` "config") from nothing.

    Collective. Dropout is off in every model; `module.dropout_rates` are the config's own, for saving.
    Raises UserError for missing, misshapen or unknown weights.
    """
    from transformers import AutoConfig, GenerationConfig

    folder = None
    with world.main_first():
        folder = None if init == "config" else resolve_folder(init, world)
    if config is None:
        config = AutoConfig.from_pretrained(str(folder))
    rates = dropout_rates(config)
    for name in rates:
        setattr(config, name, 0.0)
    module = build_on_meta(auto_class, config, dtype)
    module.dropout_rates = rates
    if folder is not None and (folder / "generation_config.json").exists():
        module.generation_config = GenerationConfig.from_pretrained(str(folder))
    offload = (deepspeed_extra or {}).get("zero_optimization", {}).get("offload_param")
    materialise(module, world, folder=folder, may_be_missing=may_be_missing(module), seed=seed, offload=offload)
    return module


def resolve_folder(init: str, world: World) -> Path:
    """A local folder as it is, a hub name downloaded once per host. Raises UserError when neither is there."""
    if Path(init).is_dir():
        return Path(init)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(init, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:
        raise UserError(f"{init}: neither a folder nor a model that the hub gives ({error})") from error


def dropout_rates(config: Any) -> dict[str, float]:
    """The dropout fields of a `transformers` config, each with its rate."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, float) and (name.endswith(("dropout", "pdrop")) or "dropout_prob" in name)
    }
