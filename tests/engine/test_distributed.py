"""Process groups: shared memory that is used and left behind by nobody."""

import os
from pathlib import Path

import torch

from gearshift.engine import World
from gearshift.engine.distributed import TensorParallelGroup
from gearshift.errors import SettingError, UserError
from tests.worker_group import WorkerGroup


def sum_in_shared_memory(world: World) -> tuple[bool, float, list[str]]:
    group = TensorParallelGroup(world, 2)
    tensor = torch.full((1000,), float(world.rank + 1))
    left = [f.name for f in Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_*")]
    return group.shares_memory, float(group.all_reduce(tensor)[-1]), left


def test_shared_memory_has_no_name_once_every_rank_has_it(two_ranks: WorkerGroup) -> None:
    """DeepSpeed leaves 69 MB a rank and job in /dev/shm; what has no name goes with its processes."""
    for used, total, left in two_ranks.run(sum_in_shared_memory):
        assert used
        assert total == 3.0
        assert left == []


def work_that_fails(world: World, error: Exception | None) -> tuple[str, str]:
    """Rank 0 raises `error`; what this rank hears of it, and that the two still answer each other afterwards."""
    heard = ("", "")
    try:
        with world.main_first():
            if world.is_main and error is not None:
                raise error
    except Exception as caught:
        heard = (type(caught).__name__, str(caught))
    assert float(world.sum(torch.ones(1))) == 2.0
    return heard


def test_whatever_stops_rank_0_stops_every_rank(two_ranks: WorkerGroup) -> None:
    assert two_ranks.run(work_that_fails, None) == [("", ""), ("", "")]
    mistake = ("UserError", "data.jsonl:3: no such field")
    assert two_ranks.run(work_that_fails, UserError(mistake[1])) == [mistake, mistake]
    own, others = two_ranks.run(work_that_fails, SettingErrorByName("a.b", "is wrong"))
    assert (own, others) == (("SettingErrorByName", "a.b: is wrong"), ("UserError", "a.b: is wrong"))
    own, others = two_ranks.run(work_that_fails, OSError("disk full"), timeout=30)
    assert own == ("OSError", "disk full")
    assert others == ("RuntimeError", "rank 0 failed: OSError: disk full")


class SettingErrorByName(SettingError):
    """One that survives the way to the ranks: two arguments, kept by pickle."""

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (type(self), (self.field, self.problem))
