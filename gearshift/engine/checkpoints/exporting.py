"""From a checkpoint's shards to a folder that `from_pretrained` loads, one parameter at a time, in one process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gearshift.engine.adapters import is_adapter, merged_by_shards, plain_name
from gearshift.engine.checkpoints.manifest import Manifest
from gearshift.engine.checkpoints.model_shards import ModelShards
from gearshift.engine.loading import build_on_meta
from gearshift.engine.saving import (
    MAX_FILE_BYTES,
    FileWriter,
    names_on_disk,
    new_folder_aside,
    replace_folder,
    write_adapters,
)
from gearshift.engine.settings import LoraSettings
from gearshift.errors import UserError


def export(model_folder: Path, out: Path, raw: bool = False, max_file_bytes: int = MAX_FILE_BYTES) -> None:
    """Writes `out` from the shards of one model (`step-.../policy`), of any number of ranks.

    The weights are the fp32 masters, or their moving average where one was kept and `raw` does not ask for the former,
    rounded to the type that the model was trained in; adapters (`policy.lora`) are merged. Files are mapped, not read,
    so that one output file's tensors are in memory at a time. Raises UserError naming the file for one that cannot be.
    """
    config, dtype = _config(model_folder)
    shards = ModelShards.open(model_folder, raw)
    model = build_on_meta(_auto_class(config), config, dtype, str(model_folder / "config.json"))
    writer = FileWriter(new_folder_aside(out), max_file_bytes)
    for name, tensor in _weights(model_folder, shards, dtype):
        for key, value in names_on_disk(model, name, tensor).items():
            writer.add(key, value)
    writer.close()
    for path in sorted(model_folder.iterdir()):
        if path.suffix != ".pt":
            shutil.copyfile(path, writer.folder / path.name)
    replace_folder(out, writer.folder)


def export_adapters(model_folder: Path, out: Path, raw: bool = False) -> None:
    """Writes the adapters alone, as a folder that `peft` loads over `policy.init`: a run's `adapter/`.

    Raises UserError for a model without adapters.
    """
    _, dtype = _config(model_folder)
    shards = ModelShards.open(model_folder, raw)
    layers = _layers_with_adapter(shards)
    if not layers:
        raise UserError(f"{model_folder}: holds no adapters: it was trained without policy.lora")
    lora, base = _lora(model_folder)
    write_adapters({layer: _factors(shards, layer, dtype) for layer in layers}, lora, base, out)


def _config(model_folder: Path) -> tuple[Any, torch.dtype]:
    """The model's config, and the type that it was trained in."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_folder)
    return config, config.dtype or torch.float32


def _auto_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    classifier = (config.architectures or [""])[0].endswith("ForSequenceClassification")
    return AutoModelForSequenceClassification if classifier else AutoModelForCausalLM


def _weights(model_folder: Path, shards: ModelShards, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """What `save_pretrained` of the live model goes through, in its order: parameters, then persistent buffers."""
    for name in shards.trained:
        if not is_adapter(name):
            yield name, shards.whole(name).to(dtype)
    layers = _layers_with_adapter(shards)
    scale = 0.0
    if layers:
        lora, _ = _lora(model_folder)
        scale = lora.alpha / lora.rank
    for name in shards.frozen:
        weight = shards.frozen_whole(name)
        layer = plain_name(name).removesuffix(".weight")
        if layer in layers:
            factors = _factors(shards, layer, dtype)
            weight = merged_by_shards(weight, *factors, scale, shards.ranks).view(weight.shape)
        yield plain_name(name), weight
    for name, buffer in shards.buffers():
        yield plain_name(name), buffer


def _layers_with_adapter(shards: ModelShards) -> list[str]:
    """By the name that their weight has without adapters, less ".weight"; in the model's order."""
    return [name.split(".lora_A.")[0] for name in shards.trained if ".lora_A." in name]


def _factors(shards: ModelShards, layer: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A `[r, I]` and B `[O, r]` of a layer, in the type that the run computed with."""
    names = {name.removeprefix(f"{layer}."): name for name in shards.trained if name.startswith(f"{layer}.lora_")}
    a, b = (names[key] for key in sorted(names))  # lora_A, lora_B
    return shards.whole(a).to(dtype), shards.whole(b).to(dtype)


def _lora(model_folder: Path) -> tuple[LoraSettings, str]:
    """The adapters' settings and the model that they go over, as the run was told. Raises UserError."""
    config = Manifest.read(model_folder.parent).config
    try:
        policy = config["policy"]
        return LoraSettings(**policy["lora"]), str(policy["init"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{model_folder}: holds adapters, and the manifest beside it no settings of them (policy.lora)"
        ) from None
