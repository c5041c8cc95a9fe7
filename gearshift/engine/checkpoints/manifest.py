"""manifest.json: what a step's folder holds, and the state of the run that is no tensor."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gearshift.engine.checkpoints import files
from gearshift.errors import UserError

NAME = "manifest.json"
FORMAT = 1
_STEP = re.compile(r"step-(\d{8,})")


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder of this name holds; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class Manifest:
    """`step`: iterations or optimizer steps done. `state`: cursors and the like, as JSON. `score`: the higher the
    better, None where the step was not validated. `files`: path in the folder -> size in bytes and SHA-256.
    """

    command: str
    step: int
    world_size: int
    tp_size: int
    config: dict[str, Any]
    state: dict[str, Any]
    versions: dict[str, str]
    score: float | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT

    def text(self) -> str:
        """The file's own text, one for each manifest: any other byte is damage."""
        values = dataclasses.asdict(self)
        return _dump({**values, "sha256": hashlib.sha256(_dump(values).encode()).hexdigest()})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Of a step's folder. Raises UserError naming the file when it is not there, or not as it was written."""
        path = folder / NAME
        try:
            text = path.read_bytes().decode()
            values = json.loads(text)
            values.pop("sha256")
            if values.get("format") != FORMAT:
                raise UserError(f"{path}: has format {values.get('format')}, this version reads {FORMAT}")
            manifest = cls(**values)
            whole = manifest.text() == text
        except FileNotFoundError:
            raise UserError(f"{path}: is missing") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            whole = False
        if not whole:
            raise UserError(f"{path}: is damaged: its text is not what was written")
        return manifest

    def problems(self, folder: Path, part: int = 0, parts: int = 1) -> Iterator[str]:
        """What is wrong with the folder, by file name. Of the files, every `parts`-th is read, from the `part`-th."""
        there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()} - {NAME}
        for name in sorted(there - set(self.files)):
            yield f"{folder / name}: is not in {NAME}: take it away"
        for name in sorted(self.files)[part::parts]:
            problem = _problem(folder / name, self.files[name])
            if problem:
                yield f"{folder / name}: {problem}"


def _problem(path: Path, entry: dict[str, Any]) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        size = path.stat().st_size
        if size != entry["size"]:
            return f"is damaged: has {size:,} bytes, {entry['size']:,} were written"
        if files.digest(path) != entry["sha256"]:
            return "is damaged: its SHA-256 is not that of what was written"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _dump(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, sort_keys=True) + "\n"
