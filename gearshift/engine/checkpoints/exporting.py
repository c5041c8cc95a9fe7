"""From a checkpoint's shards to a folder that `from_pretrained` loads, one parameter at a time, in one process."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gearshift.engine.adapters import is_adapter
from gearshift.engine.checkpoints.shards import load
from gearshift.engine.loading import build_on_meta
from gearshift.engine.saving import MAX_FILE_BYTES, FileWriter, names_on_disk, replace_folder
from gearshift.errors import UserError

_MODEL_FILE = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
_OPTIMIZER_FILE = re.compile(r".*zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


def export(model_folder: Path, out: Path, raw: bool = False, max_file_bytes: int = MAX_FILE_BYTES) -> None:
    """Writes `out` from the shards of one model (`step-.../policy`), of any number of ranks.

    The weights are the fp32 masters, or their moving average where one was kept and `raw` does not ask for the former,
    rounded to the type that the model was trained in. Files are mapped, not read, so
    that one output file's tensors are in memory at a time. Raises UserError naming the file for one that cannot be.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(model_folder)
    classifier = (config.architectures or [""])[0].endswith("ForSequenceClassification")
    auto_class = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    dtype = config.dtype or torch.float32
    model = build_on_meta(auto_class, config, dtype, str(model_folder / "config.json"))
    aside = out.with_name(out.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    writer = FileWriter(aside, max_file_bytes)
    for name, tensor in trained_weights(model_folder, raw):
        for key, value in names_on_disk(model, name, tensor.to(dtype)).items():
            writer.add(key, value)
    writer.close()
    for path in sorted(model_folder.iterdir()):
        if path.suffix != ".pt":
            shutil.copyfile(path, aside / path.name)
    replace_folder(out, aside)


def trained_weights(model_folder: Path, raw: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Name and fp32 value of every trained parameter, in the optimizer's order; see `export`.

    Rank r holds elements [r·s, (r+1)·s) of a parameter, s = ceil(numel / ranks), and its parameters one after another;
    of the last rank's part, what is past the parameter's end is padding.
    """
    shapes = _shapes(model_folder)
    flats = (None if raw else _averages(model_folder)) or _masters(model_folder)
    if any(is_adapter(name) for parameters in shapes for name in parameters):
        raise UserError(
            f"{model_folder}: holds adapters (policy.lora) and not the weights that they are added to; finish the run, "
            "which writes model/ with them merged, and adapter/"
        )
    for group, parameters in enumerate(shapes):
        at = 0
        for name, shape in parameters.items():
            size = -(-shape.numel() // len(flats))
            whole = torch.cat([flat[group][at : at + size] for flat in flats])
            at += size
            yield name, whole[: shape.numel()].view(shape)


def _shapes(model_folder: Path) -> list[dict[str, torch.Size]]:
    """Of each of the optimizer's groups: parameter -> whole shape."""
    path = model_folder / _MODEL_FILE.format(0)
    try:
        shapes: list[dict[str, torch.Size]] = load(path, mmap=True)["param_shapes"]
    except (KeyError, TypeError):
        raise UserError(f"{path}: holds no shapes of parameters") from None
    return shapes


def _averages(model_folder: Path) -> list[list[Tensor]] | None:
    """Of each rank, in order: its flat part of each group's moving average; None of a run that kept none."""
    ranks = len(_optimizer_files(model_folder))
    found = [load(model_folder / _MODEL_FILE.format(rank), mmap=True).get("average") for rank in range(ranks)]
    return None if None in found else found


def _masters(model_folder: Path) -> list[list[Tensor]]:
    """Of each rank, in order: its flat fp32 part of each group."""
    return [_fp32_groups(load(path, mmap=True), path) for path in _optimizer_files(model_folder)]


def _optimizer_files(model_folder: Path) -> list[Path]:
    """Those of rank 0, 1, ..."""
    matches = (_OPTIMIZER_FILE.fullmatch(path.name) for path in model_folder.iterdir())
    paths = {int(match[1]): model_folder / match[0] for match in matches if match}
    if sorted(paths) != list(range(len(paths))) or not paths:
        raise UserError(f"{model_folder}: holds no shards of ranks 0 to {max(paths, default=0)}")
    return [paths[rank] for rank in range(len(paths))]


def _fp32_groups(state: Any, path: Path) -> list[Tensor]:
    try:
        flat: list[Tensor] = state["optimizer_state_dict"]["fp32_flat_groups"]
    except (KeyError, TypeError):
        raise UserError(f"{path}: holds no fp32 weights") from None
    return flat
