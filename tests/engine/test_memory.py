"""What glibc is told to keep."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest

from gearshift.engine.memory import keep_freed_memory

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
