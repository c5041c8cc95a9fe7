"""What glibc is told to keep, and memory that comes and goes."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gearshift.engine import CausalModel, World
from gearshift.engine.memory import Scratch, keep_freed_memory, spare_what_is_imported
from tests.models import save_tiny
from tests.worker_group import WorkerGroup

GIB, MIB_32 = 1 << 30, 1 << 25
TRIM, MMAP = -1, -3


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What mallopt is asked, of a glibc that takes no mmap threshold above 32 MiB."""
    calls: list[tuple[int, int]] = []

    def mallopt(what: int, size: int) -> int:
        calls.append((what, size))
        return int(what == TRIM or size <= MIB_32)

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_an_older_glibc_keeps_what_it_can(asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")  # says nothing of the bounds
    keep_freed_memory()
    assert asked == [(MMAP, GIB), (MMAP, MIB_32), (TRIM, GIB)]


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "1"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1")]
)
def test_what_the_environment_says_goes_first(
    asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    keep_freed_memory()
    assert asked == []


def resident() -> int:
    """Bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux alone")
def test_scratch_memory_comes_and_goes() -> None:
    """A view of it stays what it is."""
    tensor = torch.empty(16 << 20)
    view, memory = tensor[5 << 20 :], Scratch(tensor)
    assert not memory.take()
    memory.release()  # what another test has left there
    before = resident()
    assert memory.take()
    tensor.fill_(1.0)
    held = resident()
    memory.release()
    memory.release()
    gone = resident()
    assert memory.bytes == 0
    assert held - before > 60 << 20
    assert held - gone > 60 << 20
    assert memory.take()
    assert not memory.take()
    assert memory.bytes == 64 << 20
    assert memory.comes_empty
    assert not tensor.any()  # also in pages at its ends, which may be another tensor's as well
    view.fill_(2.0)
    tensor[: 5 << 20].zero_()
    assert float(tensor.sum()) == 2.0 * (11 << 20)


def test_on_a_device_of_its_own_a_storage_is_empty_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    tensor = torch.ones(1000)
    monkeypatch.setattr(Scratch, "by_pages", False)
    memory = Scratch(tensor)
    memory.release()
    assert tensor.untyped_storage().nbytes() == 0
    assert memory.take()
    assert tensor.fill_(3.0).sum() == 3000


def spared(world: World, folder: str) -> tuple[bool, bool]:
    """Whether what is imported is spared from the first model on, and whether the model itself is looked at."""
    gc.unfreeze()
    spare_what_is_imported.cache_clear()
    model = CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=1)
    return gc.get_freeze_count() > 100_000, any(found is model.module for found in gc.get_objects())


def test_what_is_imported_is_spared_and_no_model_is(one_rank: WorkerGroup, tmp_path: Path) -> None:
    """What is spared is never found to be garbage."""
    assert one_rank.run(spared, str(save_tiny("llama", tmp_path))) == [(True, True)]
