"""Which steps stay: the newest ones and the best; and the removal of the others, which may be cut short anywhere."""

from __future__ import annotations

from pathlib import Path

from gearshift.engine.checkpoints import files
from gearshift.engine.checkpoints.manifest import Manifest, folder_name
from gearshift.engine.checkpoints.reading import POINTER, steps
from gearshift.errors import UserError

_LEFT_BEHIND = (".step-*", f".{POINTER}.*")


def best(folder: Path) -> int | None:
    """The step with the highest score; the newest of equal ones, None where no step has a score."""
    scores: list[tuple[float, int]] = []
    for step in steps(folder):
        try:
            score = Manifest.read(folder / folder_name(step)).score
        except UserError:  # damaged: no candidate
            continue
        if score is not None:
            scores.append((score, step))
    return max(scores)[1] if scores else None


def purge(folder: Path, keep: int, written: int) -> None:
    """Leaves the `keep` newest steps, the best one, and step `written`, the one that has just been completed.

    A step that goes is renamed, so that none is ever half there under its name; `remove_left_behind` removes it.
    """
    found = steps(folder)
    kept = {*found[-keep:], best(folder), written}
    for step in found:
        if step not in kept:
            files.rename(folder / folder_name(step), folder / f".{folder_name(step)}.old")
    files.flush(folder)


def remove_left_behind(folder: Path) -> None:
    """What a run that was stopped left half written or half removed, and steps that were set aside."""
    for pattern in _LEFT_BEHIND:
        for path in sorted(folder.glob(pattern)):
            files.remove(path)


def set_aside(folder: Path, chosen: Path) -> None:
    """Newer steps than the chosen one are out of the way, and gone after the next save: the run takes another course.

    The pointer moves first: whenever this stops, the newest whole step is there.
    """
    own = Manifest.read(chosen).step
    newer = [step for step in steps(folder) if step > own]
    files.replace_text(folder / POINTER, chosen.name + "\n")
    for step in newer:
        aside = folder / f".{folder_name(step)}.aside"
        files.remove(aside)
        files.rename(folder / folder_name(step), aside)
    files.flush(folder)
