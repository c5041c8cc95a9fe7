"""Process groups: what starts with them, and how a mistake of one rank ends all."""

import os
from pathlib import Path

import torch

from gearshift.engine import World
from gearshift.errors import SettingError, UserError
from tests.worker_group import WorkerGroup


def what_deepspeed_left(world: World) -> tuple[list[str], bool]:
    """In shared memory, and whether it has compiled its collectives."""
    left = [file.name for file in Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_*")]
    return left, hasattr(torch.ops.deepspeed, "inference_all_reduce_")


def test_deepspeed_s_own_collectives_are_left_alone(two_ranks: WorkerGroup) -> None:
    """They would take half a minute at a first start, and 69 MB a rank and job that nobody removes."""
    assert two_ranks.run(what_deepspeed_left) == [([], False)] * 2


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
