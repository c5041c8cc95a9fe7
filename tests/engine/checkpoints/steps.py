"""Steps of a run that needs no model: a manifest over a few small files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from gearshift.engine.checkpoints import files
from gearshift.engine.checkpoints.manifest import NAME, Manifest, folder_name
from gearshift.engine.checkpoints.reading import POINTER

CONTENT = {"policy/a.pt": "weights", "policy/b.pt": "moments", "critic/a.pt": "values", "ranks/rank-00000.pt": "dice"}


def manifest(step: int, score: float | None = None) -> Manifest:
    return Manifest("ppo", step, 1, 1, {"run": {"seed": 3}}, {"kl": 0.1}, {"torch": "2"}, score)


def write_step(folder: Path, step: int, score: float | None = None) -> Path:
    """A whole step, and the pointer at it."""
    here = folder / folder_name(step)
    entries = {}
    for name, text in CONTENT.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        entries[name] = files.write_text(here / name, f"{text} of {step}")
    files.write_text(here / NAME, dataclasses.replace(manifest(step, score), files=entries).text())
    files.replace_text(folder / POINTER, here.name + "\n")
    return here


def flip(path: Path, at: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "truncated": truncate,
    "deleted": Path.unlink,
    "emptied": empty,
}
