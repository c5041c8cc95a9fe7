"""A step of a run, put together by all ranks: every file aside, then one rename, then the pointer; and read back."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from gearshift.engine.checkpoints import files, reading, retention
from gearshift.engine.checkpoints.manifest import NAME, Manifest, folder_name
from gearshift.engine.checkpoints.random_states import random_states, set_random_states
from gearshift.engine.checkpoints.recutting import Recut
from gearshift.engine.checkpoints.shards import HostCopies, Shards, load
from gearshift.engine.distributed import World
from gearshift.errors import UserError


class Saved(Protocol):
    """A model whose shards go into a checkpoint (`ZeroModel`)."""

    def save_shards(self, shards: Shards, name: str) -> None:
        """Write this rank's files into the folder `name` below `shards.root`. Collective."""

    def load_shards(self, shards: Shards, name: str) -> None:
        """Read them back. Collective."""


@dataclass(frozen=True)
class _Begun:
    """A step whose state is copied, and whose files `thread` writes."""

    manifest: Manifest
    shards: Shards
    thread: threading.Thread


class Checkpoints:
    """The checkpoints of one run, in a folder that every rank sees. Every method is collective.

    `background`: a save copies the state, to host memory that stays, and returns; a thread writes, and the step is
    there once `poll` or `finish` has found every rank's files on the disk.
    """

    def __init__(self, folder: Path, world: World, keep: int, background: bool = False):
        self.folder, self.world, self.keep = folder, world, keep
        self._copies = HostCopies() if background else None
        self._begun: _Begun | None = None
        self._cleaning: threading.Thread | None = None
        self._not_removed: str | None = None

    def save(
        self, manifest: Manifest, models: Mapping[str, Saved], small_files: Mapping[str, bytes] | None = None
    ) -> None:
        """Writes the step that `manifest` (without files) describes; `small_files`: path in the folder -> content.

        When any rank cannot write, every rank raises UserError, here or (`background`) in `poll` or `finish`, naming
        path and bytes; what was there before stays.
        """
        self.finish()
        self._await_cleaning()
        aside = self.folder / f".{folder_name(manifest.step)}.writing"
        shards = Shards(aside, self._copies)
        shards.error = self._agreed(self._prepare(aside, [*models, "ranks"]))
        for name, model in models.items():
            model.save_shards(shards, name)
        if self.world.is_main:
            for path, content in (small_files or {}).items():
                shards.write(aside / path, partial(_write_bytes, content), len(content))
        shards.save(random_states(), str(aside / "ranks" / f"rank-{self.world.rank:05d}.pt"))
        if self._copies is None:
            shards.finish()
            self._conclude(manifest, shards)
            return
        # A process that fails does not wait for it: what it has written counts for nothing without the rename.
        self._begun = _Begun(manifest, shards, threading.Thread(target=shards.finish, daemon=True))
        self._begun.thread.start()

    def poll(self) -> None:
        """The step that was begun is there from now on, if every rank's files are on the disk. See `save`."""
        if self._begun is not None and not self.world.max(self._begun.thread.is_alive()):
            self.finish()

    def finish(self) -> None:
        """Waits for the step that was begun, if one was. See `save`."""
        if self._begun is None:
            return
        begun, self._begun = self._begun, None
        begun.thread.join()
        self._conclude(begun.manifest, begun.shards)

    def _conclude(self, manifest: Manifest, shards: Shards) -> None:
        """What this rank has to write is written, or failed: the step is there, or every rank raises UserError."""
        parts = self._gathered((shards.written, shards.bytes_needed, shards.error))
        error = next((error for *_, error in parts if error), None)
        if error is None:
            written = {name: entry for entries, *_ in parts for name, entry in entries.items()}
            error = self._agreed(self._commit(shards.root, dataclasses.replace(manifest, files=written)))
        if error is not None:
            self._fail(shards.root, error, sum(needed for _, needed, _ in parts))

    def not_removed(self) -> str | None:
        """What the disk says against removing older steps, on rank 0, once."""
        told, self._not_removed = self._not_removed, None
        return told

    def close(self) -> None:
        """Nothing more is saved: waits for what is being written, and for what is being removed."""
        self.finish()
        self._await_cleaning()
        self._agreed(None)  # all ranks wait: one that has ended would end the one that still removes

    def clear(self) -> None:
        """Removes every checkpoint: the run starts again. The folder itself stays: it may be a disk of its own."""
        error = _told(lambda: files.remove_contents(self.folder)) if self.world.is_main else None
        if error := self._agreed(error):
            raise UserError(error)

    def newest(self, refuse_damaged: bool) -> tuple[Path, list[str]]:
        """`reading.newest`, every rank reading a part of the files."""
        return reading.newest(self.folder, self.problems, refuse_damaged)

    def problems(self, step: Path) -> list[str]:
        """What is wrong with a step's folder, by file name."""
        found = self._gathered(reading.step_problems(step, self.world.rank, self.world.size))
        return list(dict.fromkeys(problem for own in found for problem in own))

    def load(self, step: Path, models: Mapping[str, Saved]) -> None:
        """The tensors of a whole step, which as many ranks have written or others. Every file is looked through before
        the first weight changes."""
        manifest, rank = Manifest.read(step), self.world.rank
        names = sorted(name for name in manifest.files if name.endswith(".pt"))
        error = self._agreed(_refused([step / name for name in names[rank :: self.world.size]]))
        if error:
            raise UserError(error)
        for name, model in models.items():
            model.load_shards(self._reader(step, manifest.world_size), name)
        if rank < manifest.world_size:  # a rank more than there were goes on with the random states that it has
            set_random_states(load(step / "ranks" / f"rank-{rank:05d}.pt"))

    def _reader(self, step: Path, ranks: int) -> Shards:
        """DeepSpeed's way to a step that `ranks` ranks wrote."""
        same = ranks == self.world.size
        return Shards(step) if same else Recut(step, ranks, self.world.rank, self.world.size)

    def go_on_from(self, step: Path) -> None:
        """From now on `step` is the newest one."""
        error = None
        if self.world.is_main and step.parent.resolve() == self.folder.resolve():
            error = _told(lambda: retention.set_aside(self.folder, step))
        if error := self._agreed(error):
            raise UserError(error)

    def _prepare(self, aside: Path, names: list[str]) -> str | None:
        """Rank 0 makes the folders, so that no rank finds one missing."""
        if not self.world.is_main:
            return None

        def make() -> None:
            if not self.folder.exists():
                files.make_folder(self.folder)
                files.flush(self.folder.parent)
            for left in self.folder.glob(".step-*.writing"):  # of a save that was cut short
                files.remove(left)
            for name in names:
                files.make_folder(aside / name)

        return _told(make)

    def _commit(self, aside: Path, manifest: Manifest) -> str | None:
        if not self.world.is_main:
            return None
        step = self.folder / folder_name(manifest.step)

        def commit() -> None:
            files.write_text(aside / NAME, manifest.text())
            for folder in [*sorted({(aside / name).parent for name in manifest.files}), aside]:
                files.flush(folder)
            self._put_in_place(aside, step)
            files.flush(self.folder)
            files.replace_text(self.folder / reading.POINTER, step.name + "\n")

        error = _told(commit)
        if error is None:
            # Gigabytes take their time to go: only the next save waits for that.
            self._cleaning = threading.Thread(target=self._clean, args=[manifest.step], daemon=True)
            self._cleaning.start()
        return error

    def _put_in_place(self, aside: Path, step: Path) -> None:
        old = self.folder / f".{step.name}.old"
        again = step.exists()  # the same step once more, after a resume from before it
        if again:
            files.remove(old)
            files.rename(step, old)
        try:
            files.rename(aside, step)
        except OSError:
            if again:
                files.rename(old, step)
            raise

    def _clean(self, written: int) -> None:
        """What cannot be removed is tried again after the next save, which fails by itself where room is lacking."""

        def clean() -> None:
            retention.purge(self.folder, self.keep, written)
            retention.remove_left_behind(self.folder)

        self._not_removed = _told(clean)

    def _await_cleaning(self) -> None:
        if self._cleaning is not None:
            self._cleaning.join()

    def _fail(self, aside: Path, error: str, needed: int) -> None:
        # The run folder itself may have been removed, or another host may not see it.
        there = next(folder for folder in [self.folder, *self.folder.absolute().parents] if folder.exists())
        free = shutil.disk_usage(there).free
        if self.world.is_main:
            _told(lambda: files.remove(aside))  # the room is needed, whatever the disk says to this too
        raise UserError(
            f"{error}; a checkpoint takes about {needed:,} bytes in {self.folder}, {free:,} were free; "
            "the checkpoints before it are untouched"
        )

    def _gathered(self, value: Any) -> list[Any]:
        """One value of each rank."""
        if self.world.size == 1:
            return [value]
        parts: list[Any] = [None] * self.world.size
        dist.all_gather_object(parts, value)
        return parts

    def _agreed(self, error: str | None) -> str | None:
        """The first rank's error, on every rank."""
        return next((told for told in self._gathered(error) if told), None)


def _write_bytes(content: bytes, file: Any) -> None:
    file.write(content)


def _told(work: Any) -> str | None:
    """What the disk says against `work()`, or None."""
    try:
        work()
    except OSError as error:
        return f"{error.filename}: cannot be written: {error.strerror}"
    return None


def _refused(paths: list[Path]) -> str | None:
    """The first file that holds more than tensors and plain values. Tensors are not read, only looked for."""
    for path in paths:
        try:
            load(path, mmap=True)
        except UserError as error:
            return str(error)
    return None


def versions() -> dict[str, str]:
    """Of what wrote a checkpoint."""
    import platform

    import deepspeed
    import transformers

    from gearshift import __version__

    return {
        "gearshift": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
    }
