"""Collectives of ranks that compute on the processors of one host, through memory that they share.

gloo sends every byte through the network stack. Here each rank writes what the others need into its own part of a piece
of memory, all meet, and each reads what it needs from where it lies. Letters: N ranks, C elements of a chunk.
"""

from __future__ import annotations

import functools
import mmap
import os
import secrets
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.engine.distributed import World
from gearshift.kernels import native

CHUNK = 1 << 23  # bytes of all ranks' parts; two chunks are under way
_HEAD = 4096  # bytes before them: the meeting, and what shows that the memory is the right one
_PATIENCE = 1000  # milliseconds before a rank looks whether the others live


class Neighbours:
    """The ranks of a world on one host. What one of them calls all call, with tensors of the same sizes.

    `parts [2, N, bytes]`: the shared memory, each rank's part of two chunks.
    """

    def __init__(self, rank: int, memory: mmap.mmap, processes: list[int]):
        self.rank, self.size, self._processes = rank, len(processes), processes
        self._memory = memory  # stays for as long as tensors see it
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self._meeting = whole.data_ptr()
        self.parts = whole[_HEAD:].view(2, self.size, -1)
        self._turn = 0  # which of the two chunks is next

    @property
    def part_bytes(self) -> int:
        """Of one rank's part of a chunk."""
        return self.parts.shape[2]

    def gathered(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Of flat tensors `[n]` of all ranks, chunk by chunk: where it starts, and `[N, C]` of it, to be read before
        the next one is asked for."""
        step = self.part_bytes // own.element_size()
        for start in range(0, len(own), step):
            parts = self._next(own.dtype)[:, : min(step, len(own) - start)]
            parts[self.rank] = own[start : start + step]
            self.meet()
            yield start, parts

    def reduce_scatter(self, own: Tensor, whole: Tensor) -> None:
        """own `[n]` becomes the sum over ranks, in their order, of this rank's row of `whole [N, n]`."""
        step = self.part_bytes // own.element_size() // self.size
        for start in range(0, len(own), step):
            stop = min(start + step, len(own))
            # [sender, receiver, C]
            parts = self._next(own.dtype)[:, : self.size * step].view(self.size, self.size, step)[..., : stop - start]
            parts[self.rank] = whole[:, start:stop]
            self.meet()
            torch.sum(parts[:, self.rank], 0, out=own[start:stop])

    def meet(self) -> None:
        """Waits until all are here. Raises ConnectionError where one has ended, or does not come in the time that any
        other collective has."""
        from deepspeed.constants import default_pg_timeout

        arrive, wait = native.function("arrive", "pi"), native.function("await", "pii")
        round_, end = arrive(self._meeting, self.size), time.monotonic() + default_pg_timeout.total_seconds()
        while not wait(self._meeting, round_, _PATIENCE):
            if time.monotonic() > end:
                raise ConnectionError(f"rank {self.rank} has waited for the others for {default_pg_timeout}")
            for rank, process in enumerate(self._processes):
                if not _is_alive(process):
                    raise ConnectionError(f"rank {rank} has ended, rank {self.rank} waits for it")

    def _next(self, dtype: torch.dtype) -> Tensor:
        """[N, part]: nobody reads it any more, since all have met after what was read in it."""
        self._turn = 1 - self._turn
        return self.parts[self._turn].view(dtype)


def neighbours(world: World) -> Neighbours | None:
    """None where ranks are on several hosts or compute on GPUs, or cannot share memory. The first time collective."""
    return _neighbours(dist.group.WORLD, world.rank, world.size, world.local_size, world.device.type)


@functools.cache
def _neighbours(group: Any, rank: int, size: int, local_size: int, device: str) -> Neighbours | None:
    """Of the ranks of `group`, all."""
    if size == 1 or size != local_size or device != "cpu":
        return None
    bytes_ = _HEAD + 2 * CHUNK // size // 64 * 64 * size
    descriptor, nonce = -1, secrets.token_bytes(16)
    if rank == 0 and _can_share():
        descriptor = os.memfd_create("gearshift")
        os.ftruncate(descriptor, bytes_)
        os.pwrite(descriptor, nonce, _HEAD - len(nonce))
    told: list[tuple[int, int, bytes]] = [(0, 0, b"")] * size
    dist.all_gather_object(told, (os.getpid(), descriptor, nonce), group=group)
    memory = _opened(told[0], bytes_) if _can_share() else None
    shared: list[bool] = [False] * size
    dist.all_gather_object(shared, memory is not None, group=group)
    if descriptor >= 0:
        os.close(descriptor)  # who has mapped it keeps it, and nobody else finds it
    if memory is None or not all(shared):
        return None
    return Neighbours(rank, memory, [process for process, _, _ in told])


def _can_share() -> bool:
    return sys.platform == "linux" and native.built() is not None


def _opened(told: tuple[int, int, bytes], size: int) -> mmap.mmap | None:
    """Rank 0's memory, by its process and descriptor; None where that is out of sight, as in another container."""
    process, descriptor, nonce = told
    try:
        own = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
    except OSError:
        return None
    try:
        memory = mmap.mmap(own, size)
    except (OSError, ValueError):
        return None
    finally:
        os.close(own)
    return memory if memory[_HEAD - len(nonce) : _HEAD] == nonce else None


def _is_alive(process: int) -> bool:
    """Not where its parent has yet to take note of its end."""
    try:
        with open(f"/proc/{process}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
