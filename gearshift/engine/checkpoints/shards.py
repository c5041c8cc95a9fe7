"""DeepSpeed's way to its files: written through `files`, read without running anything that they hold."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch import Tensor

from gearshift.engine.checkpoints import files
from gearshift.errors import UserError, one_line

# All that ZeRO-3's files hold besides what torch's weights-only reader knows: plain data, no code.
ALLOWED = [LossScaler, ZeroStageEnum]


class Shards(CheckpointEngine):
    """A `CheckpointEngine` that notes what it wrote below `root`.

    An error of the disk is kept in `error`, not raised: DeepSpeed's ranks would wait for each other. What comes after
    it is only counted: `bytes_needed` is what all files of this rank would have taken.

    Nothing is on the disk, or in `written`, before `finish`. `copies`: what is to be written is copied there, and
    `finish` writes it; None: it is written at once, and `finish` waits for the disk alone.
    """

    def __init__(self, root: Path, copies: HostCopies | None = None):
        super().__init__()
        self.root, self.copies = root, copies
        self.written: dict[str, dict[str, Any]] = {}
        self.bytes_needed = 0
        self.error: str | None = None
        self._waiting: list[Callable[[], None]] = []
        self._open: list[files.DigestFile] = []

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing: the writer makes the folder."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: the writer makes the folder, on one rank."""

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Nothing: the writer commits all models together."""
        return True

    def save(self, state_dict: Any, path: str) -> None:
        name = str(Path(path).relative_to(self.root))
        state = state_dict if self.copies is None else self.copies.of(name, state_dict)
        self.write(Path(path), partial(_save, state), _bytes_of(state))

    def write(self, path: Path, fill: Callable[[Any], Any], size: int) -> None:
        """One file of about `size` bytes, unless the disk refuses or has refused before."""
        if self.copies is None:
            self._write(path, fill, size)
        else:
            self._waiting.append(partial(self._write, path, fill, size))

    def finish(self) -> None:
        """Writes what was put off, and waits until all files are on the disk; in a thread of its own, say."""
        try:
            for work in self._waiting:
                work()
            for file in self._open:
                self._close(file)
        except BaseException as error:  # nobody waits for a thread's exception, and half a step must not be committed
            self.error = self.error or f"{self.root}: cannot be written: {one_line(error, 120)}"
        finally:
            for file in self._open:
                with suppress(OSError):
                    file.close()
            self._waiting, self._open = [], []

    def _write(self, path: Path, fill: Callable[[Any], Any], size: int) -> None:
        self.bytes_needed += size
        if self.error:
            return
        try:
            self._open.append(files.begin(path, fill))
        except (OSError, RuntimeError) as error:  # torch wraps what a file raises
            self.error = f"{path}: cannot be written: {_cause(error)}"

    def _close(self, file: files.DigestFile) -> None:
        try:
            file.close()
        except OSError as error:
            self.error = self.error or f"{file.path}: cannot be written: {_cause(error)}"
        else:
            self.written[str(file.path.relative_to(self.root))] = file.entry

    def load(self, path: str, map_location: Any = None) -> Any:
        return load(Path(path))

    @contextmanager
    def serving(self, engine: Any) -> Iterator[None]:
        """DeepSpeed's `engine` reads and writes through this in here.

        Its two recovery scripts, which unpickle anything, are left out: `gearshift export` is there instead.
        """
        before, engine.checkpoint_engine = engine.checkpoint_engine, self
        engine._copy_recovery_script = lambda path: None
        try:
            yield
        finally:
            engine.checkpoint_engine = before
            del engine._copy_recovery_script


def _save(state: Any, file: Any) -> None:
    """As `torch.save`, without the zip format's own checksums: the manifest's digest is over every byte."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, file)
    finally:
        torch.serialization.set_crc32_options(before)


def load(path: Path, mmap: bool = False) -> Any:
    """What a file of tensors and plain values holds, on the CPU. Raises UserError naming the file for anything else."""
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # whatever a crafted file provokes
        found = re.search(r"(?:GLOBAL|class|global|function) [`']?([\w.]+)", str(error))
        what = f"it names {found[1]}" if found else one_line(error, 120)
        raise UserError(f"{path}: refused, nothing of it was run: {what}") from None


class HostCopies:
    """Copies of nested states in host memory, which the next copy under the same name uses again."""

    def __init__(self) -> None:
        self._tensors: dict[str, list[Tensor]] = {}

    def of(self, name: str, state: Any) -> Any:
        """The state as it is now: its tensors copied, all else as well; nothing changes it until the next call."""
        now: list[Tensor] = []
        copied = _copied(state, iter(self._tensors.get(name, [])), now)
        self._tensors[name] = now
        return copied


def _copied(value: Any, before: Iterator[Tensor], now: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        held = next(before, None)
        if held is None or held.shape != value.shape or held.dtype != value.dtype:
            held = torch.empty(value.shape, dtype=value.dtype)
        now.append(held.copy_(value.detach()))
        return held
    if isinstance(value, dict):
        same = copy.copy(value)
        same.update((name, _copied(inner, before, now)) for name, inner in value.items())
        return same
    if type(value) in (list, tuple):
        return type(value)(_copied(inner, before, now) for inner in value)
    return copy.deepcopy(value)


def _bytes_of(value: Any) -> int:
    """Bytes of the tensors in a nested state; a storage that several share counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(value)}
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def _cause(error: BaseException) -> str:
    """The disk's own words, which torch's writer may have wrapped."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        inner = inner.__cause__ or inner.__context__
    return one_line(error, 120)
