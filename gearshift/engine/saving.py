"""`save_pretrained` from ZeRO-3 shards: parameter by parameter, written aside and renamed."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gearshift.engine.adapters import adapters_of, is_adapter, merged_whole, peft_config, plain_name
from gearshift.engine.distributed import World
from gearshift.engine.settings import LoraSettings
from gearshift.engine.weights import persistent_buffers

MAX_FILE_BYTES = 2 << 30


def save_pretrained(
    model: Any,
    folder: Path,
    world: World,
    *,
    tokenizer: Any = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write a folder that `from_pretrained` loads: config, safetensors, tokenizer. Collective: every rank calls it.

    Rank 0 holds one file's tensors at a time. An existing folder is replaced only when the new one is complete.
    """
    writer = FileWriter(new_folder_aside(folder), max_file_bytes) if world.is_main else None
    for name, tensor in chain(gathered_parameters(model), persistent_buffers(model)):
        if writer is not None:
            for key, value in names_on_disk(model, name, tensor).items():
                writer.add(key, value.cpu())
    if writer is not None:
        writer.close()
        _save_small_files(model, tokenizer, writer.folder)
        replace_folder(folder, writer.folder)
    if world.size > 1:
        torch.distributed.barrier()


def small_files(model: Any, tokenizer: Any = None) -> dict[str, bytes]:
    """What a `save_pretrained` folder holds besides the weights: name -> content."""
    with tempfile.TemporaryDirectory() as folder:
        _save_small_files(model, tokenizer, Path(folder))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def _save_small_files(model: Any, tokenizer: Any, folder: Path) -> None:
    _config_to_save(model).save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def gathered_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, whole, on the host (tied ones under their first name), adapters merged. Collective."""
    import deepspeed

    adapters = {f"{adapter.layer}.base_layer.weight": adapter for adapter in adapters_of(model)}
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        if name in adapters:
            yield plain_name(name), merged_whole(adapters[name])
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            tensor = parameter.detach().to("cpu", copy=True)
        yield plain_name(name), tensor


def save_adapters(model: Any, folder: Path, world: World, base: str) -> None:
    """Write the adapters alone, as a folder that `peft` loads over `base`. Collective."""
    import deepspeed

    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for adapter in adapters_of(model):
        with deepspeed.zero.GatheredParameters(list(adapter.factors)):
            a, b = (factor.detach().to("cpu", copy=True) for factor in adapter.factors)
        factors[adapter.layer] = a, b
    if world.is_main:
        write_adapters(factors, model.lora, base, folder)
    if world.size > 1:
        torch.distributed.barrier()


def write_adapters(
    factors: Mapping[str, tuple[Tensor, Tensor]], settings: LoraSettings, base: str, folder: Path
) -> None:
    """The folder of `save_adapters`, written aside and renamed; `factors`: layer -> A `[r, I]` and B `[O, r]`."""
    from peft import LoraConfig

    tensors = {
        f"base_model.model.{layer}.{name}.weight": factor
        for layer, pair in factors.items()
        for name, factor in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    aside = new_folder_aside(folder)
    save_file(tensors, aside / "adapter_model.safetensors", metadata={"format": "pt"})
    config = peft_config(LoraConfig, settings)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(aside)
    replace_folder(folder, aside)


def _config_to_save(model: Any) -> Any:
    """The model's config with the class that its weights belong to, and the dropout rates that it came with."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    for name, rate in getattr(model, "dropout_rates", {}).items():
        setattr(config, name, rate)
    return config


def names_on_disk(model: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The name that other loaders expect: `transformers`' renamings, undone."""
    from transformers.core_model_loading import revert_weight_conversion

    reverted: dict[str, Tensor] = revert_weight_conversion(model, {name: tensor})
    return reverted


class FileWriter:
    """Collects tensors and writes a safetensors file each time the bound is reached; the index comes last."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = self.total_bytes = 0
        self.files: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > self.max_bytes:
            self._flush()
        self.pending[name] = tensor.contiguous()
        self.pending_bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        save_file(self.pending, self.folder / f"part-{len(self.files)}", metadata={"format": "pt"})
        self.files.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def close(self) -> None:
        self._flush()
        count = len(self.files)
        if count == 1:
            os.replace(self.folder / "part-0", self.folder / "model.safetensors")
            return
        weight_map = {}
        for i, names in enumerate(self.files):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self.folder / f"part-{i}", self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True))


def new_folder_aside(folder: Path) -> Path:
    """An empty folder beside the one that it will replace."""
    aside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def replace_folder(folder: Path, aside: Path) -> None:
    """Put the complete folder in place; the old one stays until then."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)
