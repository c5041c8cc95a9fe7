"""What is done to the files of a checkpoint. Each operation is told to a hook first, so that tests can stop there."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gearshift.engine.checkpoints.direct import DirectFile

# Called as hook("write", path) before the operation happens; operations: folder, create, write, flush, rename, remove.
Hook = Callable[[str, Path], None]
hook: Hook | None = None

BUFFER_BYTES = 4 << 20


def _before(operation: str, path: Path) -> None:
    if hook is not None:
        hook(operation, path)


def make_folder(path: Path) -> None:
    _before("folder", path)
    path.mkdir(parents=True, exist_ok=True)


def rename(path: Path, to: Path) -> None:
    """Atomic; an existing file at `to` is replaced. Lasts once the folder is flushed."""
    _before("rename", path)
    os.replace(path, to)


def flush(path: Path) -> None:
    """What was written to a file, or created, renamed or removed in a folder, survives a power cut from here on."""
    _before("flush", path)
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        remove_contents(path)
        _before("remove", path)
        path.rmdir()
    elif path.exists() or path.is_symlink():
        _before("remove", path)
        path.unlink()


def remove_contents(folder: Path) -> None:
    """All that is in a folder; no folder is fine."""
    if folder.is_dir():
        for inner in sorted(folder.iterdir()):
            remove(inner)


class DigestFile(io.RawIOBase):
    """A new file that counts and digests what is written to it, and is flushed to the disk when it is closed.

    The disk writes meanwhile what came before (see `DirectFile`).
    """

    _file: DirectFile | None = None  # until it is there

    def __init__(self, path: Path):
        _before("create", path)
        self.path, self.size = path, 0
        self._digest = hashlib.sha256()
        with self._named():
            self._file = DirectFile(path)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        _before("write", self.path)
        assert self._file is not None
        piece = memoryview(data).cast("B")
        with self._named():
            written = self._file.write(piece)  # the caller comes again with the rest
        self._digest.update(piece[:written])
        self.size += written
        return written

    def finish(self) -> None:
        """Nothing more is written."""
        assert self._file is not None
        with self._named():
            self._file.finish()

    def close(self) -> None:
        if self.closed or self._file is None:
            return
        try:
            _before("flush", self.path)
            with self._named():
                self._file.flush()
        finally:
            self._file.close()
            super().close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """An error of the disk names the file, which those of an open file do not."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    @property
    def entry(self) -> dict[str, Any]:
        """What a manifest says of this file."""
        return {"size": self.size, "sha256": self._digest.hexdigest()}


def begin(path: Path, fill: Callable[[Any], Any]) -> DigestFile:
    """`fill(file)` writes a new file front to back; closing what this returns waits for the disk."""
    raw = DigestFile(path)
    buffered = io.BufferedWriter(raw, BUFFER_BYTES)
    try:
        fill(buffered)
        buffered.flush()
    except BaseException:
        # A buffer that could not be written is tried again when it is closed: the first error is the one to tell.
        with suppress(OSError):
            buffered.close()
        raise
    buffered.detach()
    try:
        raw.finish()
    except BaseException:
        with suppress(OSError):
            raw.close()
        raise
    return raw


def write(path: Path, fill: Callable[[Any], Any]) -> dict[str, Any]:
    """As `begin`; the file is on the disk when this returns its manifest entry."""
    raw = begin(path, fill)
    raw.close()
    return raw.entry


def write_text(path: Path, text: str) -> dict[str, Any]:
    return write(path, lambda file: file.write(text.encode()))


def replace_text(path: Path, text: str) -> None:
    """The file holds the old text or the new, whenever the machine stops."""
    aside = path.with_name(f".{path.name}.writing")
    write_text(aside, text)
    rename(aside, path)
    flush(path.parent)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
