"""What the small files of a model folder say: its config, and which tensor lies in which file. No torch here.

A safetensors file is 8 bytes with the length of its header, the header (JSON: name -> dtype, shape, data_offsets), and
the tensors' bytes: the header alone tells whether the file is whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gearshift.errors import UserError, one_line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError naming the file when it cannot be read or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"{path}: is not JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold a JSON object, not a {type(value).__name__}")
    return value


def config_number(config: dict[str, Any], *names: str) -> int | None:
    """The first of these fields that a config.json has, in its text part too."""
    for values in (config, config.get("text_config")):
        for name in names:
            if isinstance(values, dict) and isinstance(values.get(name), int):
                return int(values[name])
    return None


def weight_files(folder: Path) -> dict[str, str]:
    """Tensor name -> the name of the safetensors file that holds it; every file is there, and whole.

    Raises UserError naming the file that is not.
    """
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if not (folder / SINGLE).is_file():
        raise UserError(f"{folder}: no {SINGLE} (or .index.json) in this folder")
    return dict.fromkeys(_tensor_names(folder / SINGLE), SINGLE)


def _indexed(folder: Path) -> dict[str, str]:
    weight_map = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{folder / INDEX}: has no weight_map (tensor name: file name)")
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: is missing, though {INDEX} names it: copy it there again")
        held = _tensor_names(folder / file)
        lacking = next((name for name, its_file in weight_map.items() if its_file == file and name not in held), None)
        if lacking:
            raise UserError(f"{folder / file}: lacks {lacking}, which {INDEX} says it holds")
    return weight_map


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Of a safetensors file: where the tensors' bytes begin, and what it says of each (`dtype`, `shape`,
    `data_offsets` from there). Raises UserError for a file that is not whole."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        # Any other file's first bytes make a number larger than the file.
        header = opened.read(length) if length <= size else b""
    try:
        tensors: dict[str, Any] = json.loads(header)
        tensors.pop("__metadata__", None)
        whole = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError):
        raise UserError(f"{file}: is not a whole safetensors file: copy it there again") from None
    if size != whole:
        raise UserError(f"{file}: has {size:,} bytes, its header says {whole:,}: copy it there again")
    return 8 + length, tensors


def _tensor_names(file: Path) -> set[str]:
    return set(read_header(file)[1])
