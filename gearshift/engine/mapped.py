"""Frozen weights that are the pages of their own files: in memory while forwards read them, and gone after.

On a CPU whose one rank keeps each weight whole, as a file holds it. Of an embedding only the rows of a batch's tokens
are ever read. What others do with a file is seen before each use: one that is replaced stays what it was for who has it
open, one that is written to ends the run. (One that is cut short in the middle of a forward ends it by SIGBUS.)
"""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.engine.distributed import World
from gearshift.engine.folder import read_header
from gearshift.engine.weights import SafetensorsFolder
from gearshift.errors import UserError

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

# Bytes. Less is not worth it, and in a file lies as it happens to: a product with so few weights may round otherwise.
SMALL = 1 << 16
# Settings with which DeepSpeed keeps weights elsewhere, or not as they are.
ELSEWHERE = (
    "offload_param",
    "stage3_param_persistence_threshold",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
)
Header = tuple[int, dict[str, Any]]


class MappedWeights:
    """Of one model."""

    def __init__(self, source: SafetensorsFolder):
        self._source = source
        self._headers: dict[Path, Header] = {}
        self._files: dict[Path, _File] = {}

    def take(self, name: str, parameter: Any) -> None:
        """The shard of a parameter that was just loaded becomes its part of the file, where that is the same."""
        place, shard = self._source.place(name), parameter.ds_tensor
        if place is None or shard.nbytes < SMALL:
            return
        path, key = place
        if path not in self._headers:
            self._headers[path] = read_header(path)
        start, entry = self._headers[path][0], self._headers[path][1][key]
        begin, end = entry["data_offsets"]
        if (entry["dtype"], end - begin) != (_TYPES.get(shard.dtype), shard.nbytes):
            return
        if path not in self._files:
            self._files[path] = _File(path)
        shard.data = self._files[path].tensor(start + begin, shard)

    def check(self) -> None:
        """Raises UserError if somebody has written to a file since it was mapped."""
        for file in self._files.values():
            file.check()

    def leave(self) -> None:
        """They take no memory until somebody reads them."""
        for file in self._files.values():
            file.leave()


def may_map(model: nn.Module, world: World, zero: dict[str, Any]) -> bool:
    """Whether weights that no step changes may stay in their files: where `engine.whole` will see to them. `zero`: the
    user's `zero_optimization` section."""
    here = world.size == 1 and world.device.type == "cpu" and sys.platform == "linux"
    alike = len({parameter.dtype for parameter in model.parameters()}) == 1
    return here and alike and not any(name in zero for name in ELSEWHERE)


class _File:
    """A file as it is now, mapped. It stays open, so that a file which takes its place is another one."""

    def __init__(self, path: Path):
        self._path, self._opened = path, path.open("rb")
        self._was = self._now()
        # Private pages: nothing that is done here could reach the file. None is expected to be written.
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
        self._mapped = mmap.mmap(self._opened.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def tensor(self, start: int, like: Tensor) -> Tensor:
        return torch.frombuffer(self._mapped, dtype=like.dtype, count=like.numel(), offset=start)

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
