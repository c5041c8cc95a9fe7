"""The ranks that hold one replica of the rollout weights together, and what they sum."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.engine.distributed import World
from gearshift.engine.neighbours import shared
from gearshift.engine.placement import Placement


class TensorParallelGroup:
    """`placement` says which ranks; `rank` is this one's part, `index` its group.

    On the processors of one host fp32 goes through memory that they share (`neighbours`), all else through the process
    group. The sums of shared memory are tasks of the compiled library, which a recorded step can do again.
    """

    def __init__(self, world: World, size: int):
        """Collective over the world."""
        self.placement = Placement(world.size, size, world.local_size)
        self.world, self.size = world, size
        self.rank, self.index = self.placement.part(world.rank), self.placement.group_of(world.rank)
        self.group: dist.ProcessGroup | None = None
        if size > 1:
            groups = [dist.new_group(self.placement.group(g)) for g in range(self.placement.group_count)]
            self.group = groups[self.index]
        self.neighbours = None
        if world.device.type == "cpu":
            # Hosts may have other numbers of ranks: each is known by its first one.
            self.neighbours = shared(
                self.group, self.rank, self.placement.group(self.index), world.rank - world.local_rank
            )

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the group. The result may be in place; a non-contiguous input is made contiguous first."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        if self.neighbours is not None and tensor.dtype == torch.float32:
            return self.neighbours.sum(tensor)
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """`[...]` of each rank stacked to `[size, ...]` in rank order."""
        if self.size == 1:
            return tensor[None]
        tensor = tensor.contiguous()
        if self.neighbours is not None and tensor.dtype == torch.float32:
            return self.neighbours.stacked(tensor)
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor, group=self.group)
        return torch.stack(parts)
