"""Frozen weights that are the pages of their own files: in memory while forwards read them, and gone after.

On a CPU whose one rank keeps each weight whole, as a file holds it. Of an embedding only the rows of a batch's tokens
are ever read. What others do with a file is seen: one that is replaced stays what it was for who has it open, one that
is written to ends the run.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gearshift.engine.distributed import World
from gearshift.engine.folder import read_header
from gearshift.engine.weights import SafetensorsFolder
from gearshift.errors import UserError

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class MappedWeights:
    """Of one model."""

    def __init__(self, source: SafetensorsFolder):
        self._source = source
        self._files: dict[Path, _File] = {}

    def take(self, name: str, parameter: Any) -> None:
        """The shard of a parameter that was just loaded becomes its part of the file, where that is the same."""
        place = self._source.place(name)
        if place is None:
            return
        file, key = place
        if file not in self._files:
            self._files[file] = _File(file)
        found = self._files[file].tensor(key, parameter.ds_tensor.dtype)
        if found is not None and found.numel() == parameter.ds_tensor.numel():
            parameter.ds_tensor.data = found

    def check(self) -> None:
        """Raises UserError if somebody has written to a file since it was mapped."""
        for file in self._files.values():
            file.check()

    def leave(self) -> None:
        """They take no memory until somebody reads them."""
        for file in self._files.values():
            file.leave()


def may_map(world: World, offload: dict[str, Any] | None) -> bool:
    """Whether weights that no step changes may stay in their files."""
    return world.size == 1 and world.device.type == "cpu" and not offload and hasattr(mmap, "MADV_DONTNEED")


class _File:
    """A safetensors file as it is now, mapped. It stays open, so that a file which takes its place is another one."""

    def __init__(self, path: Path):
        self._path = path
        self._start, self._header = read_header(path)
        self._opened = path.open("rb")
        self._was = self._now()
        # Private pages: nothing that is done here could reach the file.
        self._mapped = mmap.mmap(self._opened.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, key: str, dtype: torch.dtype) -> Tensor | None:
        """What it holds under a name, flat, if it is of this type."""
        entry = self._header[key]
        begin, end = entry["data_offsets"]
        if entry["dtype"] != _TYPES.get(dtype) or begin == end:
            return None
        return torch.frombuffer(
            self._mapped, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=self._start + begin
        )

    def check(self) -> None:
        if self._now() != self._was:
            raise UserError(
                f"{self._path} was written to while this run reads its weights: they are no longer those that it began "
                "with; leave a model's folder alone while runs use it"
            )

    def leave(self) -> None:
        self._mapped.madvise(mmap.MADV_DONTNEED)

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self._opened.fileno())
        return found.st_size, found.st_mtime_ns
