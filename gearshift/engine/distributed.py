"""Processes: who this rank is, and how the process group comes up."""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.engine.memory import keep_freed_memory
from gearshift.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, `local_rank` of `local_size` on its host, and its device."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """The contiguous part of `rows` global rows that belongs to this rank (ranks differ by one row at most)."""
        return slice(self.rank * rows // self.size, (self.rank + 1) * rows // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Work that only rank 0 can fail at: when it does, every rank stops here, so that none waits for it.

        Rank 0 raises its own exception; the others a UserError of the same words, or a RuntimeError that names it.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        told: list[Exception | None] = [_to_other_ranks(error) if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(told, src=0, device=self.device)
        if error or told[0]:
            raise error or told[0]  # type: ignore[misc]

    def max(self, value: float) -> float:
        """Largest of one number per rank."""
        tensor = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor)


def _to_other_ranks(error: Exception | None) -> Exception | None:
    """What the other ranks raise for rank 0's exception, whose own type they may not be able to unpickle."""
    if error is None or type(error) is UserError:
        return error
    if isinstance(error, UserError):
        return UserError(str(error))
    return RuntimeError(f"rank 0 failed: {type(error).__name__}: {error}")


def init_distributed(store: Any = None) -> World:
    """Join the process group that the launcher's environment describes (`RANK`, `LOCAL_RANK`, `WORLD_SIZE`).

    `store`: where the ranks have met (`meet`); without it they find each other at `MASTER_ADDR` and `MASTER_PORT`.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    import_muon()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 wants renamed: nothing that a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), _local_size()
    os.environ.setdefault("LOCAL_SIZE", str(local_size))
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    if on_cpu:
        keep_freed_memory()
    if not dist.is_initialized():
        with _quiet_stdout():
            if on_cpu:
                # Collectives that nothing here uses (see `neighbours`). On a first start DeepSpeed would compile them
                # for half a minute, or wait for ever behind a killed build, and leave 69 MB a rank in /dev/shm.
                deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            if store is not None:
                _init_on(store, local_rank)
            deepspeed.init_distributed(verbose=False)
    device = torch.device("cpu") if on_cpu else torch.device(accelerator.device_name(local_rank))
    return World(dist.get_rank(), dist.get_world_size(), local_rank, local_size, device)


def import_muon() -> None:
    """DeepSpeed's Muon optimizer, whose functions are compiled at their first call, and not where they stand.

    ZeRO-3 imports it to see that it is not used; its decorators would import torch's whole inductor: two seconds and
    40 MiB of every rank.
    """
    from deepspeed.runtime import compiler

    # A DeepSpeed that has it elsewhere imports it its own way.
    with suppress(ImportError), patch.object(compiler, "compile", lambda: _compiled_when_called, create=True):
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401


def _compiled_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    once = functools.cache(lambda: torch.compile(function))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return once()(*args, **kwargs)

    return call


def _init_on(store: Any, local_rank: int) -> None:
    """The process group as DeepSpeed would start it, which takes up what is there; it has no way to name a store."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.constants import default_pg_timeout

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    accelerator = get_accelerator()
    device = torch.device("cuda", local_rank) if accelerator.device_name() == "cuda" and size > 1 else None
    store.set_timeout(default_pg_timeout)
    dist.init_process_group(
        accelerator.communication_backend_name(),
        store=store,
        rank=rank,
        world_size=size,
        timeout=default_pg_timeout,
        device_id=device,
    )


def _local_size() -> int:
    """Ranks on this host, by whichever launcher started them (LOCAL_SIZE: deepspeed; LOCAL_WORLD_SIZE: torchrun)."""
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        if name in os.environ:
            return int(os.environ[name])
    return 1


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """DeepSpeed prints build notes to stdout, which belongs to the command's own output."""
    saved = sys.stdout
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        yield
    finally:
        sys.stdout.close()
        sys.stdout = saved


def now(device: torch.device) -> float:
    """Seconds, all that was launched on the device done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()
