"""Files written past the cache: the same bytes, whatever their size and however the file system answers."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from gearshift.engine.checkpoints import direct
from gearshift.engine.checkpoints.direct import DirectFile

SIZES = [0, 1, 4095, 4096, 4097, 3 * 8192, 3 * 8192 + 5]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "BLOCK_BYTES", 8192)


def write(path: Path, data: bytes, piece: int) -> None:
    file, left = DirectFile(path), memoryview(data)
    while left:
        left = left[file.write(left[:piece]) :]
    file.finish()
    file.flush()
    file.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("piece", [1000, 100_000])
def test_the_file_holds_what_was_written(tmp_path: Path, size: int, piece: int) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(b"what was there before" * 9999)
    write(tmp_path / "file", data, piece)
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("where", ["open", "pwrite"])
def test_a_file_system_without_such_a_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    own, refused = getattr(os, where), []

    def refusing(first: Any, *rest: Any, **named: Any) -> Any:
        asks = where == "open" and rest[0] & direct._NO_CACHE
        if asks or (where == "pwrite" and not refused):
            refused.append(first)
            raise OSError(errno.EINVAL, "Invalid argument")
        return own(first, *rest, **named)

    monkeypatch.setattr(os, where, refusing)
    data = os.urandom(20_000)
    write(tmp_path / "file", data, 3000)
    assert (tmp_path / "file").read_bytes() == data
    assert refused


def test_what_the_disk_says_of_an_earlier_block_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = DirectFile(tmp_path / "file")
    monkeypatch.setattr(os, "pwrite", full)
    file.write(memoryview(bytes(8192)))  # on its way
    with pytest.raises(OSError, match="No space left"):
        file.write(memoryview(bytes(8192)))
    file.close()
