"""A few gloo processes for one function: lighter than a `WorkerGroup`, as kernels need no DeepSpeed and no models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(size: int, function: Callable[[int], Any], folder: Path) -> list[Any]:
    """`function(rank)` in each of `size` processes of one world; the results in rank order."""
    mp.spawn(_rank, args=(size, function, str(folder)), nprocs=size)
    return [torch.load(folder / f"rank{rank}", weights_only=False) for rank in range(size)]


def _rank(rank: int, size: int, function: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.save(function(rank), f"{folder}/rank{rank}")
    dist.destroy_process_group()


def refusal(function: Callable[[], Any]) -> str:
    """What a ValueError says, "" when there is none."""
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""
