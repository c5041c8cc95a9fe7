"""Process groups: what starts with them, and how a mistake of one rank ends all."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import CausalModel, Training, World
from gearshift.engine.distributed import import_muon
from gearshift.errors import SettingError, UserError
from tests.models import save_tiny
from tests.worker_group import WorkerGroup


def what_deepspeed_left(world: World) -> tuple[list[str], bool]:
    """In shared memory, and whether it has compiled its collectives."""
    left = [file.name for file in Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_*")]
    return left, hasattr(torch.ops.deepspeed, "inference_all_reduce_")


def test_deepspeed_s_own_collectives_are_left_alone(two_ranks: WorkerGroup) -> None:
    """They would take half a minute at a first start, and 69 MB a rank and job that nobody removes."""
    assert two_ranks.run(what_deepspeed_left) == [([], False)] * 2


def trained_without_inductor(world: World, folder: str) -> bool:
    CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=1, training=Training(learning_rate=0.1))
    return "torch._inductor.compile_fx" not in sys.modules


def test_nothing_is_compiled_at_the_start(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    """ZeRO-3 imports an optimizer whose functions are compiled, which takes two seconds and 40 MiB if it is done."""
    assert two_ranks.run(trained_without_inductor, str(save_tiny("llama", tmp_path))) == [True] * 2


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
