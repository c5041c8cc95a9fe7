"""Which step to go on from: the newest that is whole. No torch here: `gearshift verify` uses it too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gearshift.engine.checkpoints.manifest import Manifest, folder_name, step_of
from gearshift.errors import UserError

POINTER = "latest"
Problems = Callable[[Path], list[str]]


def steps(folder: Path) -> list[int]:
    """The steps that have a folder, whole or not, in rising order."""
    if not folder.is_dir():
        return []
    found = (step_of(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(step for step in found if step is not None)


def step_problems(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with one step's folder, by file name; nothing when it is whole. See `Manifest.problems`."""
    try:
        manifest = Manifest.read(folder)
    except UserError as error:
        return [str(error)]
    if folder_name(manifest.step) != folder.name and step_of(folder.name) is not None:
        return [f"{folder}: holds step {manifest.step}: give it back its name, {folder_name(manifest.step)}"]
    return list(manifest.problems(folder, part, parts))


def pointer_problem(folder: Path) -> str | None:
    """What is wrong with the pointer, by file name; a step newer than it is the mark of a run stopped in between."""
    path, found = folder / POINTER, steps(folder)
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        return f"{path}: is missing" if found else None
    except (OSError, ValueError):
        text = ""
    step = step_of(text.removesuffix("\n"))
    if step is None or not text.endswith("\n"):
        return f"{path}: is damaged: it names no step"
    return None if step in found else f"{path}: names {folder_name(step)}, which is not there"


def newest(folder: Path, problems: Problems = step_problems, refuse: bool = False) -> tuple[Path, list[str]]:
    """The folder of the newest whole step, and what was found wrong on the way to it.

    With `refuse` anything wrong is a UserError, and so is, always, that no whole step is there.
    """
    found = [problem] if (problem := pointer_problem(folder)) else []
    chosen: Path | None = None
    for step in reversed(steps(folder)):
        wrong = problems(folder / folder_name(step))
        if not wrong:
            chosen = folder / folder_name(step)
            break
        found += wrong
    if chosen is None:
        more = f": {found[0]}" if found else ""
        raise UserError(f"{folder}: there is no whole checkpoint to resume from{more}")
    if found and refuse:
        raise UserError(f"{found[0]} (checkpoint.damaged: older would go on from {chosen.name})")
    return chosen, found
