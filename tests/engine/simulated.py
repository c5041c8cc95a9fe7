"""Ranks of a tensor-parallel group as threads of one process: any number of them, at no start-up cost."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

from gearshift.engine.sampling import HeadShard


class SimulatedGroup:
    """What `TensorParallelGroup` does, by a table that the threads share."""

    def __init__(self, rank: int, size: int, table: list[Any], barrier: Barrier):
        self.rank, self.size, self._table, self._barrier = rank, size, table, barrier
        self.bytes_told = 0

    def all_gather(self, tensor: Tensor) -> Tensor:
        self.bytes_told += tensor.nbytes
        self._table[self.rank] = tensor
        self._barrier.wait(60)
        every = torch.stack(list(self._table))
        self._barrier.wait(60)
        return every

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self.all_gather(tensor).sum(0)


def on_ranks(size: int, function: Callable[[Any], Any]) -> list[Any]:
    """`function(group)` on each of `size` ranks, in rank order."""
    table: list[Any] = [None] * size
    barrier = Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(function, [SimulatedGroup(rank, size, table, barrier) for rank in range(size)]))


def shard(head: HeadShard, rank: int, size: int) -> HeadShard:
    """A rank's part of a whole head, cut as `TensorParallelLayout` cuts a vocabulary."""
    rows = len(head.weight)
    low, high = rank * rows // size, (rank + 1) * rows // size
    return HeadShard(head.weight[low:high], None if head.bias is None else head.bias[low:high], low, head.transform)
