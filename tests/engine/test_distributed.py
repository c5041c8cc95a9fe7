"""Process groups: shared memory that is used and left behind by nobody."""

import os
from pathlib import Path

import torch

from gearshift.engine import World
from gearshift.engine.distributed import TensorParallelGroup
from tests.worker_group import WorkerGroup


def sum_in_shared_memory(world: World) -> tuple[bool, float, list[str]]:
    group = TensorParallelGroup(world, 2)
    tensor = torch.full((1000,), float(world.rank + 1))
    left = [f.name for f in Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_*")]
    return group._shared_memory, float(group.all_reduce(tensor)[-1]), left


def test_shared_memory_has_no_name_once_every_rank_has_it(two_ranks: WorkerGroup) -> None:
    """DeepSpeed leaves 69 MB a rank and job in /dev/shm; what has no name goes with its processes."""
    for used, total, left in two_ranks.run(sum_in_shared_memory):
        assert used
        assert total == 3.0
        assert left == []
