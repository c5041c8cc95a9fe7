"""Memory: how much of it a process took, and memory that is given back for a while."""

from __future__ import annotations

import ctypes
import functools
import gc
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


@functools.cache
def spare_what_is_imported() -> None:
    """Garbage is no longer looked for among what is there now, once for a process: modules stay to its end.

    DeepSpeed looks through everything at the start of each engine, which takes half a second with all that is imported.
    """
    gc.collect()
    gc.freeze()


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
        self._start = self._storage.data_ptr()
        self.comes_empty = False  # whether it holds zeros after `take`; what nobody writes of it then takes no memory
        self._on_host = tensor.device.type == "cpu" and self.by_pages
        if self._on_host:
            _advise(self._start, self._size, _HUGE_PAGES)  # they come again in steps of 2 MiB instead of 4 KiB

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
            self.comes_empty = _advise(self._start, self._size, _NOT_NEEDED)
            self._clear_edges()
        elif self._there:
            self._storage.resize_(0)
        self._there = False

    def expect(self, part: Tensor, pieces: int, size: int) -> bool:
        """Of a part of the tensor only so many pieces of `size` bytes, wherever they are, will be written before
        `release`. Whether these are in few of its pages of 4 KiB, and it comes in such instead of ones of 2 MiB."""
        page = resource.getpagesize()
        few = pieces * (size // page + 2) * page < part.nbytes // 2
        if self._on_host:
            _advise(part.data_ptr(), part.nbytes, _SMALL_PAGES if few else _HUGE_PAGES)
        return few

    def _clear_edges(self) -> None:
        """What stands in a page with something else did not go."""
        whole = torch.empty(0, dtype=torch.uint8).set_(self._storage)
        start, end = _pages(self._start, self._size)
        whole[: start - self._start] = 0
        whole[end - self._start :] = 0


_NOT_NEEDED, _HUGE_PAGES, _SMALL_PAGES = 4, 14, 15  # sys/mman.h of Linux


def _pages(start: int, size: int) -> tuple[int, int]:
    """Where the whole pages in it begin and end."""
    page = resource.getpagesize()
    first = min(-(-start // page) * page, start + size)
    return first, max(first, (start + size) // page * page)


def _advise(start: int, size: int, advice: int) -> bool:
    """Tells Linux of the whole pages in it, and whether that took it; elsewhere nothing is told, and memory stays."""
    if sys.platform != "linux":
        return False
    call, (start, end) = ctypes.CDLL(None).madvise, _pages(start, size)
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return start >= end or call(start, end - start, advice) == 0


def forget_zeros(tensor: Tensor) -> None:
    """Of zeros on a CPU: their pages go, and each comes again when somebody asks for it."""
    _advise(tensor.data_ptr(), tensor.nbytes, _NOT_NEEDED)


def untouched_zeros(like: Tensor) -> Tensor:
    """Zeros of a tensor's shape, which take no memory on a CPU until somebody writes others."""
    found = torch.empty_like(like)
    memory = Scratch(found)
    memory.release()
    memory.take()
    return found if memory.comes_empty else found.zero_()


def take_small_pages(tensor: Tensor) -> None:
    """Parts of it will be left out, and are in few of its pages of 4 KiB."""
    _advise(tensor.data_ptr(), tensor.nbytes, _SMALL_PAGES)


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
