"""Memory: how much of it a process took, and memory that is given back for a while."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterable

import torch
from torch import Tensor


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held so far: of the device's memory, or on a CPU of the host's (resident)."""
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere else


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """On a CPU: what tensors of up to 1 GiB leave is kept for the next ones.

    glibc takes blocks of more than 32 MiB, gathered weights and gradients, from the system and gives them back, which
    then clears each of their pages whenever they are taken again. What the environment says of these bounds goes first.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    told = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys()
    if mallopt is None or told or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    if not mallopt(_MMAP_THRESHOLD, 1 << 30):
        mallopt(_MMAP_THRESHOLD, 1 << 25)  # older versions take no more; the next line alone would leave 128 KiB
    mallopt(_TRIM_THRESHOLD, 1 << 30)


class Releasable:
    """Tensors whose memory can be given back and taken again, while they and all views of them stay what they are.

    What they held is lost. Nothing may read them between `release` and `restore`.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
        self._storages = [(storage, storage.nbytes()) for storage in storages.values()]

    @property
    def bytes(self) -> int:
        """What they take when they are there."""
        return sum(size for _, size in self._storages)

    def release(self) -> None:
        for storage, _ in self._storages:
            storage.resize_(0)

    def restore(self) -> bool:
        """Whether there was anything to take; what was taken is filled with 0."""
        gone = [(storage, size) for storage, size in self._storages if storage.nbytes() != size]
        for storage, size in gone:
            storage.resize_(size)
            torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).zero_()
        return bool(gone)
