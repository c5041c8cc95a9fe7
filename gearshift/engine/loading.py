"""Models that come into being already cut over the ranks: from a folder or from nothing, one module at a time.

The model is built on the meta device. Then each module's own parameters are made real, filled on rank 0 (read from
a safetensors file, or initialised by the model's own rule), broadcast and cut by ZeRO-3, before the next module's.
No device ever holds the whole model; rank 0's host holds one module, and what of a file it is read from, beside its
shard (`benchmarks/loading.py` measures it).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gearshift.engine.adapters import add_adapters
from gearshift.engine.distributed import World
from gearshift.engine.mapped import MappedWeights, may_map
from gearshift.engine.memory import spare_what_is_imported
from gearshift.engine.settings import LoraSettings
from gearshift.engine.weights import SafetensorsFolder, persistent_buffers
from gearshift.errors import SettingError, UserError, one_line

# Parameters loaded between two times that freed memory goes back to the system: see `_return_freed_memory`.
TRIM_EVERY_BYTES = 64 << 20


def build_on_meta(auto_class: Any, config: Any, dtype: torch.dtype, origin: str = "config.json") -> Any:
    """The model with parameters on the meta device and real buffers (`inv_freq` and the like are computed).

    Raises SettingError, naming the config's `origin` (a file or a setting), for a model that cannot be.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    _check_head_exists(auto_class, config, origin)
    try:
        # Weights that have no memory need no values: that takes most of the time.
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = auto_class.from_config(config, dtype=dtype)
    except Exception as error:  # sizes that do not fit, an unknown activation ...: each family raises its own types
        raise SettingError(origin, f"no {config.model_type} can be built from it: {one_line(error)}") from error
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            # Padding is masked by lengths here. Torch would keep the row of the pad token from learning (a pad equal
            # to EOS is a token like any other) and look for it in a slice of the vocabulary that lacks it.
            module.padding_idx = None
    _keep_buffers_exact(model)
    return model


def _keep_buffers_exact(model: nn.Module) -> None:
    """Those that `transformers` keeps in fp32 whatever the model's type: a router's correction bias."""
    exact = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if any(part in f"{prefix}.{name}" for part in exact):
                module._buffers[name] = buffer.float()


HEADS = {"AutoModelForCausalLM": "causal language model", "AutoModelForSequenceClassification": "sequence classifier"}


def _check_head_exists(auto_class: Any, config: Any, origin: str) -> None:
    """`transformers` has this kind of model for the family (Cohere and Granite, for one, have no classifier)."""
    if type(config) not in auto_class._model_mapping:
        kind = HEADS.get(auto_class.__name__, auto_class.__name__)
        raise SettingError(
            origin, f"transformers has no {kind} for {config.model_type}: use another family, such as llama or qwen2"
        )


def materialise(
    model: Any,
    world: World,
    *,
    folder: Path | None,
    may_be_missing: Iterable[str] = (),
    head_check: Callable[[Any], None] | None = None,
    seed: int = 0,
    zero: dict[str, Any] | None = None,
    frozen: bool = False,
) -> None:
    """Fill every parameter and cut it by ZeRO-3, module by module. Collective.

    `folder` None: all is initialised by the model's own rule, from `seed`, the same for any number of ranks.
    `may_be_missing`: parameters that are initialised when the folder lacks them (a new value head).
    `head_check`: called with the model on rank 0 while the weight of its LM head is whole.
    `zero`: the user's `zero_optimization` section.
    `frozen`: no step will change it, so that weights may stay in their files (`engine.mapped`).
    Raises UserError on every rank for a missing parameter or a wrong shape. Only rank 0 reads the folder.
    """
    allowed = set(may_be_missing)
    source: SafetensorsFolder | None = None
    with world.main_first():
        if world.is_main and folder is not None:
            source = SafetensorsFolder(folder, model)
            source.check(model, allowed)
    mapped = MappedWeights(source) if source is not None and frozen and may_map(model, world, zero or {}) else None
    model.mapped = mapped
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    owners, since_trim = _owners(model), 0
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(world.device)  # DeepSpeed places parameters, not these
        own = _make_real(module, owners)
        if not own:
            continue
        if world.is_main:
            _fill(model, module, prefix, own, source if folder is not None else None, allowed)
        if head_check is not None and any(p is model.get_output_embeddings().weight for p in own.values()):
            with world.main_first():
                if world.is_main:
                    head_check(model)
        size = sum(p.numel() * p.element_size() for p in own.values())
        partition(own, (zero or {}).get("offload_param") or {})
        if mapped is not None:
            for name, path in _paths(prefix, own).items():
                mapped.take(path, own[name])
        since_trim += size
        if since_trim >= TRIM_EVERY_BYTES:
            _return_freed_memory()
            since_trim = 0
    _load_buffers(model, source, world)
    _return_freed_memory()
    torch.set_rng_state(generator_state)


def _return_freed_memory() -> None:
    """Where the C library can: glibc keeps what lies freed between the shards, half as much again as the shards."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _owners(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Every parameter, and the modules that call it their own, under which name (a tied one has two)."""
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((module, name))
    return owners


def _make_real(module: nn.Module, owners: dict[nn.Parameter, list[tuple[nn.Module, str]]]) -> dict[str, nn.Parameter]:
    """Replace a module's own meta parameters, wherever they are tied to; returns the new ones."""
    new = {}
    for name, meta in list(module.named_parameters(recurse=False)):
        if not meta.is_meta:  # a tied one, which came with another module
            continue
        new[name] = nn.Parameter(torch.empty(meta.shape, dtype=meta.dtype), requires_grad=meta.requires_grad)
        for owner, own_name in owners[meta]:
            owner._parameters[own_name] = new[name]
    return new


def _paths(prefix: str, own: Iterable[str]) -> dict[str, str]:
    """A module's own parameters: their names in the model."""
    return {name: f"{prefix}.{name}" if prefix else name for name in own}


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
    paths = _paths(prefix, own)
    if source is None or any(path in may_be_missing and path not in source for path in paths.values()):
        model._init_weights(module)
    if source is not None:
        for name, path in paths.items():
            if path in source:
                own[name].copy_(source.read(path))


@torch.no_grad()
def _load_buffers(model: nn.Module, source: SafetensorsFolder | None, world: World) -> None:
    """Rank 0's persistent buffers, read from the folder where it has them, to all ranks. Collective."""
    for path, buffer in persistent_buffers(model):
        if source is not None and path in source:
            buffer.copy_(source.read(path))
        if world.size > 1:
            torch.distributed.broadcast(buffer, 0)


def partition(own: dict[str, nn.Parameter], offload: dict[str, Any]) -> None:
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
    head_check: Callable[[Any], None] | None = None,
    seed: int = 0,
    deepspeed_extra: dict[str, Any] | None = None,
    lora: LoraSettings | None = None,
    frozen: bool = False,
) -> Any:
    """A ZeRO-3-cut `transformers` module from a folder or hub name, or (with `init` "config") from nothing.

    Collective. Dropout is off in every model; `module.dropout_rates` are the config's own, for saving. With `lora`,
    Linear layers get adapters. `frozen`: as in `materialise`.
    Raises UserError for missing, misshapen or unknown weights.
    """
    folder = None
    with world.main_first():
        folder = None if init == "config" else resolve_folder(init, world)
    if config is None:
        config = config_of(str(folder))
    rates = dropout_rates(config)
    for name in rates:
        setattr(config, name, 0.0)
    spare_what_is_imported()
    module = build_on_meta(auto_class, config, dtype, "policy.config" if folder is None else f"{init}/config.json")
    module.dropout_rates = rates
    if folder is not None and (folder / "generation_config.json").exists():
        module.generation_config = _generation_config(folder)
    zero = (deepspeed_extra or {}).get("zero_optimization") or {}
    materialise(
        module,
        world,
        folder=folder,
        may_be_missing=may_be_missing(module),
        head_check=head_check,
        seed=seed,
        zero=zero,
        frozen=frozen,
    )
    if lora is not None:
        for factor in add_adapters(module, lora, seed):
            partition({"weight": factor}, zero.get("offload_param") or {})
    return module


def config_of(init: str, **changes: Any) -> Any:
    """The `transformers` config of a folder or hub name. Raises UserError: no JSON, an unknown model_type, ..."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(init, **changes)
    except Exception as error:  # whatever the hub, the JSON parser and the family's own checks raise
        raise UserError(f"{init}/config.json: {one_line(error)}") from error


def _generation_config(folder: Path) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(str(folder))
    except Exception as error:
        raise UserError(f"{folder}/generation_config.json: {one_line(error)}") from error


def resolve_folder(init: str, world: World) -> Path:
    """A local folder as it is, a hub name downloaded once per host. Raises UserError when neither is there."""
    if Path(init).is_dir():
        return Path(init)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(init, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:
        raise UserError(f"{init}: neither a folder nor a model that the hub gives ({one_line(error)})") from error


def dropout_rates(config: Any) -> dict[str, float]:
    """The dropout fields of a `transformers` config, each with its rate."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, float) and (name.endswith(("dropout", "pdrop")) or "dropout_prob" in name)
    }
