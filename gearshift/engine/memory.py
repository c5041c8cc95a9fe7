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


class Scratch:
    """A tensor's memory, all of its storage, which is there now and then: the tensor and its views stay what they are.

    What it held is lost. On a GPU nothing may read it between `release` and `take`; on a CPU its pages go back to the
    system, and come again when somebody touches them (`by_pages`; if that is off, a CPU's go as a GPU's, for who counts
    tensors).
    """

    by_pages = True

    def __init__(self, tensor: Tensor):
        self._storage = tensor.untyped_storage()
        self._size, self._there = self._storage.nbytes(), True
        self._on_host = tensor.device.type == "cpu" and self.by_pages
        if self._on_host:
            _advise(self._storage, _HUGE_PAGES)  # they come again in steps of 2 MiB instead of 4 KiB

    @property
    def bytes(self) -> int:
        """What it takes now."""
        return self._size if self._there else 0

    def take(self) -> bool:
        """Whether it was not there; what it holds then means nothing."""
        if self._there:
            return False
        if not self._on_host:
            self._storage.resize_(self._size)
        self._there = True
        return True

    def release(self) -> None:
        if self._there and self._on_host:
            _advise(self._storage, _NOT_NEEDED)
        elif self._there:
            self._storage.resize_(0)
        self._there = False


_NOT_NEEDED, _HUGE_PAGES = 4, 14  # sys/mman.h of Linux


def _advise(storage: torch.UntypedStorage, advice: int) -> None:
    """Tells Linux of the whole pages in it; elsewhere nothing is told, and memory stays."""
    if sys.platform != "linux":
        return
    call, page = ctypes.CDLL(None).madvise, resource.getpagesize()
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = -(-storage.data_ptr() // page) * page
    end = (storage.data_ptr() + storage.nbytes()) // page * page
    if start < end:
        call(start, end - start, advice)


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
