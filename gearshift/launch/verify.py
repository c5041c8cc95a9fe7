"""`gearshift verify CHECKPOINT`: is every byte of a checkpoint what was written, and is nothing in it but tensors?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gearshift.engine.checkpoints.manifest import NAME, Manifest, folder_name, step_of
from gearshift.engine.checkpoints.reading import pointer_problem, step_problems, steps
from gearshift.engine.checkpoints.settings import FOLDER
from gearshift.errors import UserError
from gearshift.launch.arguments import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when everything is whole, 1 when something is not, which is then named."""
    parser = Parser(prog="gearshift verify", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("checkpoint", type=Path, help="a step's folder; or a run's folder, for all of its steps")
    checkpoint = parser.parse_args(argv).checkpoint
    found = checkpoints_in(checkpoint)
    problems = [problem for step in found for problem in _tell(step)]
    if found != [checkpoint] and (problem := pointer_problem(found[0].parent)):
        print(problem)
        problems.append(problem)
    return 1 if problems else 0


def checkpoints_in(path: Path) -> list[Path]:
    """The step's folder itself, or those of a run's folder or of its checkpoints/, oldest first. Raises UserError."""
    if step_of(path.name) is not None or (path / NAME).is_file():
        return [path]
    for folder in (path, path / FOLDER):
        if steps(folder):
            return [folder / folder_name(step) for step in steps(folder)]
    raise UserError(f"{path} holds no checkpoint: name a run's folder, or one of its {FOLDER}/step-... folders")


def newest_in(path: Path) -> Path:
    """The step that `path` names, or the newest of a run; whole, or UserError names the file that is not."""
    step = checkpoints_in(path)[-1]
    for problem in problems_of(step):
        raise UserError(problem)
    return step


def problems_of(step: Path) -> list[str]:
    """Of a step's folder: what is damaged, and what holds more than tensors and plain values."""
    problems = step_problems(step)
    if problems:
        return problems
    # Imported here, and for the CPU: DeepSpeed's classes are part of what its files may hold.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from gearshift.engine.checkpoints.shards import load

    for name in sorted(Manifest.read(step).files):
        if name.endswith(".pt"):
            try:
                load(step / name, mmap=True)
            except UserError as error:
                problems.append(str(error))
    return problems


def _tell(step: Path) -> list[str]:
    problems = problems_of(step)
    if problems:
        print("\n".join(problems))
        return problems
    manifest = Manifest.read(step)
    size = sum(entry["size"] for entry in manifest.files.values())
    score = "" if manifest.score is None else f", validation {manifest.score:.4g}"
    print(
        f"{step}: whole: gearshift {manifest.command}, step {manifest.step}, {manifest.world_size} ranks, "
        f"{len(manifest.files)} files, {size:,} bytes{score}"
    )
    return []
