"""Processes: who this rank is, and how the process group and the shared-memory collectives come up."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.engine.memory import keep_freed_memory
from gearshift.engine.placement import Placement
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
    DeepSpeed compiles its shared-memory all-reduce for CPUs on the first start (about 30 s).
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

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
        if on_cpu:
            build_shared_memory_ops()
        with _quiet_stdout():
            if store is not None:
                _init_on(store, local_rank)
            deepspeed.init_distributed(verbose=False)
        _unlink_shared_memory()
    device = torch.device("cpu") if on_cpu else torch.device(accelerator.device_name(local_rank))
    return World(dist.get_rank(), dist.get_world_size(), local_rank, local_size, device)


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


def build_shared_memory_ops() -> bool:
    """Compile DeepSpeed's shared-memory collectives once, one process at a time.

    A build that was killed leaves torch's lock file behind and every later start would wait for it for ever. Builds
    are therefore guarded by a file lock that the kernel drops when its holder dies: who holds that lock may remove
    what a dead build left. Without a compiler the collectives of gloo are used, and a line says so.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # The environment's own ninja, also when the environment is not activated: another version of ninja would find
    # every build of this one out of date.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    root = extensions_folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(root)
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".gearshift.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in root.glob("**/lock"):
            stale.unlink(missing_ok=True)
        if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
            print("gearshift: no C++ compiler found; rollouts use gloo's all-reduce, which is slower", file=sys.stderr)
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            return False
        if not any(root.glob("*/*.so")):
            print("gearshift: compiling DeepSpeed's shared-memory collectives, once (about 30 s)", file=sys.stderr)
        with _quiet_stdout():
            builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
            if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
                return False
            builder.load(verbose=False)
    return True


def _unlink_shared_memory() -> None:
    """Remove the names of DeepSpeed's shared-memory buffers, which every rank of this host has mapped by now.

    DeepSpeed 0.19 never removes them: each job would leave 69 MB a rank in /dev/shm, until the host's memory is full.
    What is mapped stays until the processes end, however they end.
    """
    dist.barrier()
    address, port, rank = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"), os.environ["RANK"]
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{address}_{port}_{rank}"):
        buffer.unlink(missing_ok=True)


def extensions_folder() -> Path:
    """TORCH_EXTENSIONS_DIR, else one for each Python environment: what one compiled is out of date to the next, whose
    headers lie elsewhere."""
    if named := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(named)
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    return Path.home() / ".cache/gearshift/torch_extensions" / f"{sys.implementation.cache_tag}-{environment}"


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


class TensorParallelGroup:
    """The ranks that hold one replica of the rollout weights together.

    `placement` says which; `rank` is this one's part, `index` its group. On CPU the all-reduce goes through DeepSpeed's
    shared memory where that is right (`shares_memory`): it ignores the group, so only when the group is the whole world
    and the world is one host.
    """

    def __init__(self, world: World, size: int):
        self.placement = Placement(world.size, size, world.local_size)
        self.world, self.size = world, size
        self.rank, self.index = self.placement.part(world.rank), self.placement.group_of(world.rank)
        self.group: dist.ProcessGroup | None = None
        if size > 1:
            groups = [dist.new_group(self.placement.group(g)) for g in range(self.placement.group_count)]
            self.group = groups[self.index]
        self.shares_memory = (
            world.device.type == "cpu"
            and size == world.size == world.local_size
            and hasattr(torch.ops.deepspeed, "inference_all_reduce_")
        )

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the group. The result may be in place; a non-contiguous input is made contiguous first."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        if self.shares_memory and tensor.dtype == torch.float32:
            import deepspeed.comm

            return deepspeed.comm.inference_all_reduce(tensor)
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """`[...]` of each rank stacked to `[size, ...]` in rank order."""
        if self.size == 1:
            return tensor[None]
        # A sum with zeros elsewhere: exact, and it goes through shared memory, which has no all-gather.
        if self.shares_memory and tensor.dtype == torch.float32:
            stacked = tensor.new_zeros(self.size, *tensor.shape)
            stacked[self.rank] = tensor
            return self.all_reduce(stacked)
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.stack(parts)
