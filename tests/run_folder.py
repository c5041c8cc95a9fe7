"""docs/run-folder.md as a check: what of a run's folder the page does not name."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

PAGE = Path(__file__).parents[1] / "docs/run-folder.md"


def unnamed(folder: Path) -> list[str]:
    """The files below a run folder that no pattern of the page is for, relative to it."""
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink())
    known = patterns()
    return [str(name) for name in names if not any(_matches(PurePosixPath(name), pattern) for pattern in known)]


def patterns() -> list[str]:
    """Of files in a run folder: `*` stands for a part of a name, `**` at the end for all below a folder."""
    text = PAGE.read_text(encoding="utf-8")
    of_model = [pattern for row in _rows(text, "A model's folder") for pattern in _quoted(row)]
    found = []
    for row in _rows(text, "The run"):
        for pattern in _quoted(row):
            found += [pattern + inner for inner in of_model] if "(a model's folder)" in row else [pattern]
    return found


def _rows(text: str, heading: str) -> list[str]:
    """The first cell of each row of the table under a heading."""
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]


def _quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def _matches(name: PurePosixPath, pattern: str) -> bool:
    if pattern.endswith("/**"):
        return str(name).startswith(pattern.removesuffix("**"))
    return len(name.parts) == len(PurePosixPath(pattern).parts) and name.match(pattern)
