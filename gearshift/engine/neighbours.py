"""Collectives of ranks that compute on the processors of one host, through memory that they share.

gloo sends every byte through the network stack. Here each rank writes what the others need into its own part of a piece
of memory, all meet, and each reads what it needs from where it lies. DeepSpeed's collectives of that kind know only one
group, all ranks of the world, and never give up a processor while they wait. Letters: N ranks, C elements of a chunk.
"""

from __future__ import annotations

import ctypes
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
from gearshift.kernels.native import tasks
from gearshift.kernels.native.tasks import Task, Tasks

CHUNK = 1 << 23  # bytes of all ranks' parts; two chunks are under way
_HEAD = 4096  # bytes before them: the meeting, and what shows that the memory is the right one
_PATIENCE = 1000  # milliseconds before a rank looks whether the others live
_LONGER = 60.0  # seconds beside those that any other collective has: a watchdog that has as long speaks first
_UNIT, _GRAIN = 4096, 4  # numbers of a unit of the compiled functions, as they have it; units worth a thread
_FEW = _UNIT * _GRAIN

_Together = tasks.structure(
    "Together",
    "ranks i, rank i, numbers i, room i, whole i, milliseconds i, meeting p, processes p, parts p, x p, y p",
)


class Neighbours:
    """Ranks on one host, `rank` is the place of this one. What one of them calls all call, with tensors of the same
    sizes.

    Raises ConnectionError where a rank has ended, or does not come in a minute more than any other collective has. From
    then on all of them do, on every rank.

    `parts [2, N, bytes]`: the shared memory, each rank's part of two chunks.
    """

    def __init__(self, rank: int, memory: mmap.mmap, processes: list[int], ranks: list[int]):
        """`ranks`: which ones of the world these are, run by `processes`."""
        self.rank, self.size = rank, len(ranks)
        self._processes = torch.tensor([processes, ranks])
        self._memory = memory  # stays for as long as tensors see it
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self._meeting = whole.data_ptr()
        self._round = ctypes.c_int32.from_address(self._meeting + 4)  # meetings so far
        self.parts = whole[_HEAD:].view(2, self.size, -1)
        self._shared = self._meeting, self._processes.data_ptr(), self.parts.data_ptr()

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

    def sum(self, tensor: Tensor) -> Tensor:
        """Of contiguous fp32, in the order of ranks, in place. A task: a step that is recorded may do it."""
        native.run("sum_over_ranks", Tasks(self._tasks(tensor, tensor, 0)))
        return tensor

    def stacked(self, tensor: Tensor) -> Tensor:
        """`[...]` contiguous fp32 -> `[N, ...]`. A task as well."""
        out = tensor.new_empty(self.size, *tensor.shape)
        native.run("gather_ranks", Tasks(self._tasks(tensor, out, tensor.numel())))
        return out

    def _tasks(self, x: Tensor, y: Tensor, whole: int) -> Iterator[Task]:
        assert x.dtype == y.dtype == torch.float32
        limit, room = int(_seconds() * 1000), self.part_bytes // x.element_size()
        for start in range(0, x.numel(), room):
            numbers = min(room, x.numel() - start)
            given = (x.data_ptr() + 4 * start, y.data_ptr() + 4 * start)
            arguments = _Together(self.size, self.rank, numbers, room, whole, limit, *self._shared, *given)
            if numbers <= _FEW:
                yield Task("together", arguments, 1)
                continue
            units = -(-numbers // _UNIT)
            yield Task("put_part", arguments, units, _GRAIN)
            yield Task("meet", arguments, 1)
            yield Task("take_parts", arguments, units, _GRAIN)

    def meet(self) -> None:
        """Waits until all are here."""
        arrive, wait = native.function("arrive", "pi"), native.function("await", "pipii")
        round_, end = arrive(self._meeting, self.size), time.monotonic() + _seconds()
        processes = self._processes.data_ptr()
        # Python looks at signals in between.
        while (state := wait(self._meeting, self.size, processes, round_, _PATIENCE)) == tasks.NOT_YET:
            if time.monotonic() > end:
                state = native.function("fail", "pi")(self._meeting, tasks.TOO_LATE)
                break
        if state:
            raise tasks.failure(state)

    def _next(self, dtype: torch.dtype) -> Tensor:
        """[N, part]: nobody reads it any more, since all have met after what was read in it."""
        return self.parts[self._round.value & 1].view(dtype)


def _seconds() -> float:
    from deepspeed.constants import default_pg_timeout

    return float(default_pg_timeout.total_seconds()) + _LONGER


def neighbours(world: World) -> Neighbours | None:
    """Of all ranks. None where they are on several hosts or compute on GPUs, or cannot share memory. Collective, the
    first time."""
    if world.size != world.local_size or world.device.type != "cpu":
        return None
    return _of_world(dist.group.WORLD, world.rank, world.size)


@functools.cache
def _of_world(group: Any, rank: int, size: int) -> Neighbours | None:
    return shared(group, rank, list(range(size)), 0)


def shared(group: Any, rank: int, ranks: list[int], host: int) -> Neighbours | None:
    """Of the process group `group`, in the order of `ranks`, their places in the world; `rank`: this one's among them;
    `host`: a number of its host. None where there is one rank alone, or they are on several hosts, or cannot share
    memory. Collective over the group."""
    size = len(ranks)
    if size == 1:
        return None
    bytes_ = _HEAD + 2 * CHUNK // size // 64 * 64 * size
    descriptor, nonce = -1, secrets.token_bytes(16)
    if rank == 0 and _can_share():
        descriptor = os.memfd_create("gearshift")
        os.ftruncate(descriptor, bytes_)
        os.pwrite(descriptor, nonce, _HEAD - len(nonce))
    told: list[tuple[int, int, int, bytes]] = [(0, 0, 0, b"")] * size
    dist.all_gather_object(told, (host, os.getpid(), descriptor, nonce), group=group)
    one_host = len({where for where, *_ in told}) == 1
    memory = _opened(*told[0][1:], bytes_) if one_host and _can_share() else None
    is_shared: list[bool] = [False] * size
    dist.all_gather_object(is_shared, memory is not None, group=group)
    if descriptor >= 0:
        os.close(descriptor)  # who has mapped it keeps it, and nobody else finds it
    if memory is None or not all(is_shared):
        return None
    return Neighbours(rank, memory, [process for _, process, *_ in told], ranks)


def _can_share() -> bool:
    return sys.platform == "linux" and native.built() is not None


def _opened(process: int, descriptor: int, nonce: bytes, size: int) -> mmap.mmap | None:
    """The first rank's memory, by its process and descriptor; None where that is out of sight (another container)."""
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
