"""Process groups: what starts with them, and how a mistake of one rank ends all."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import World
from gearshift.engine.distributed import import_muon
from gearshift.errors import SettingError, UserError
from gearshift.launch.processes import free_port
from tests.worker_group import WorkerGroup


def what_deepspeed_left(world: World) -> tuple[list[str], bool]:
    """In shared memory, and whether it has compiled its collectives."""
    left = [file.name for file in Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_*")]
    return left, hasattr(torch.ops.deepspeed, "inference_all_reduce_")


def test_deepspeed_s_own_collectives_are_left_alone(two_ranks: WorkerGroup) -> None:
    """They would take half a minute at a first start, and 69 MB a rank and job that nobody removes."""
    assert two_ranks.run(what_deepspeed_left) == [([], False)] * 2


START = """
import sys
from gearshift.engine import init_distributed
init_distributed()
import deepspeed.runtime.zero.stage3, deepspeed.runtime.zero.muon.muon_optimizer
print("torch._inductor.compile_fx" in sys.modules)
"""


def test_nothing_is_compiled_at_the_start() -> None:
    """ZeRO-3 imports an optimizer whose functions are compiled, which takes two seconds and 40 MiB if it is done. (Of a
    process of its own: the ranks of tests have imported it before.)"""
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), "0") | dict.fromkeys(("WORLD_SIZE", "LOCAL_SIZE"), "1")
    environment = {**os.environ, **ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run([sys.executable, "-c", START], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_what_is_compiled_when_it_is_called_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import_muon()
    from deepspeed.runtime.zero.muon import original_muon

    compiled: list[str] = []

    def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    gradient = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        found = original_muon.zeropower_via_newtonschulz5(gradient, 20)
        values = torch.linalg.svdvals(found.float())
        assert 0.5 < values.min() < values.max() < 1.5, "its zeroth power: all singular values about 1"
    assert compiled == ["zeropower_via_newtonschulz5"]


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
