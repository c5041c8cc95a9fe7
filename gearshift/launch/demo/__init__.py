"""`gearshift demo`: InstructGPT's whole recipe on a toy world, from nothing to a report, through the real commands.

The stages' configs stand beside this file; they are copied to the demo's folder, where each can be run again by hand.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from gearshift.errors import UserError
from gearshift.launch.demo.checks import check
from gearshift.launch.launcher import visible_gpus

STAGES = {
    "pretrain": "pretrain",
    "sft": "sft",
    "reward": "reward",
    "ppo": "ppo",
    "ppo-ptx": "ppo",
    "compare": "compare",
}
FOLDER = "runs/demo"  # as the configs have it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs every stage, checks the outcome, writes the report. Returns 0, or 1 when a stage or a check failed."""
    parser = argparse.ArgumentParser(prog="gearshift demo", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", default=FOLDER, help=f"where everything is written (default: {FOLDER})")
    parser.add_argument(
        "--ranks", type=int, help="processes, 1, 2, 4 or 8 (default: as many as there are GPUs, else 2)"
    )
    options = parser.parse_args(argv)
    folder, ranks = Path(options.folder), options.ranks or _ranks()
    if ranks not in (1, 2, 4, 8):
        raise UserError(f"--ranks: {ranks} does not divide the demo's batches: use 1, 2, 4 or 8")
    _start_afresh(folder)
    _write_world(folder)
    timings: dict[str, float] = {}
    for stage, command in STAGES.items():
        code = _run(stage, command, folder, ranks, timings)
        if code:
            print(f"gearshift demo: the stage {stage} failed", file=sys.stderr)
            return code
    checks = check(folder)
    _write(folder / "checks.json", checks)
    from gearshift.launch.report import demo_report

    page = demo_report(folder)
    print(f"\n{sum(timings.values()):.0f} s in all")
    for one in checks:
        print(f"{'ok    ' if one['passed'] else 'FAILED'} {one['name']}: {one['detail']}")
    print(f"\nreport: {page}")
    return 0 if all(one["passed"] for one in checks) else 1


def _ranks() -> int:
    """The largest of 1, 2, 4 and 8 that the GPUs allow; 2 on a CPU."""
    gpus = len(visible_gpus())
    return max(n for n in (1, 2, 4, 8) if n <= gpus) if gpus else 2


def _start_afresh(folder: Path) -> None:
    """Remove what an earlier demo left; a folder that is something else is not touched."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "world").is_dir():
        raise UserError(f"--folder: {folder} holds something that is not a demo; choose a new folder")
    for name in [*STAGES, "world", "configs", "report"]:
        shutil.rmtree(folder / name, ignore_errors=True)


def _write_world(folder: Path) -> None:
    from gearshift.rlhf.toyworld import about, write_world

    write_world(folder / "world")
    _write(folder / "world" / "about.json", about())


def _run(stage: str, command: str, folder: Path, ranks: int, timings: dict[str, float]) -> int:
    """One stage through its own command, as a person would start it."""
    config = folder / "configs" / f"{stage}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    text = (files(__package__) / f"{stage}.yaml").read_text(encoding="utf-8")
    config.write_text(text.replace(FOLDER, folder.as_posix()), encoding="utf-8")
    arguments = [str(config), f"--run.ranks={ranks}"]
    if command in ("ppo", "compare"):
        arguments.append(f"--rollout.tp_size={min(2, ranks)}")
    print(f"\n== {stage}: gearshift {command} {' '.join(arguments)}", flush=True)
    start = time.perf_counter()
    code: int = importlib.import_module(f"gearshift.launch.{command}").main(arguments)
    timings[stage] = time.perf_counter() - start
    _write(folder / "timings.json", timings)
    return code


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
