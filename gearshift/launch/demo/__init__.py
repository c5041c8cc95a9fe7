"""`gearshift demo`: InstructGPT's whole recipe on a toy world, from nothing to a report, through the real commands.

The stages' configs stand beside this file; they are copied to the demo's folder, where each can be run again by hand.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from gearshift.errors import UserError
from gearshift.launch.arguments import Parser
from gearshift.launch.demo.checks import check
from gearshift.launch.devices import visible_gpus

FOLDER = "runs/demo"  # as the configs have it
# Without a critic: they compare answers to one prompt, so each prompt gets several. GRPO has its penalty in the loss.
OTHER_ADVANTAGES: dict[str, dict[str, Any]] = {
    "grpo": {"ppo.advantage": "grpo", "ppo.answers": 4, "ppo.kl.where": "loss", "ppo.kl.estimator": "k3"},
    "rloo": {"ppo.advantage": "rloo", "ppo.answers": 4},
}


@dataclass(frozen=True)
class Stage:
    """One command of the demo: its run folder's name, the config beside this file, settings in place of the config's.

    A folder's name in `settings` is relative to the demo's."""

    name: str
    command: str
    config: str
    settings: dict[str, str] = field(default_factory=dict)


def stages(full: bool) -> list[Stage]:
    """What the demo runs, in order. `full`: all seven systems of the paper, and GRPO and RLOO."""
    recipe = [Stage(name, name, name) for name in ("pretrain", "sft", "reward", "ppo")]
    recipe.append(Stage("ppo-ptx", "ppo", "ppo-ptx"))
    if not full:
        return [*recipe, Stage("compare", "compare", "compare")]
    recipe[3:3] = [Stage(name, "sft", name) for name in ("flan", "t0")]
    for name, settings in OTHER_ADVANTAGES.items():
        own = {"run.folder": name} | {key: str(value) for key, value in settings.items()}
        recipe.append(Stage(name, "ppo", "ppo", own))
    systems = {f"systems.{name}.init": f"{name}/model" for name in OTHER_ADVANTAGES}
    return [*recipe, Stage("compare", "compare", "compare-full", systems)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs every stage, checks the outcome, writes the report. Returns 0, or 1 when a stage or a check failed."""
    parser = Parser(prog="gearshift demo", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", default=FOLDER, help=f"where everything is written (default: {FOLDER})")
    parser.add_argument(
        "--ranks", type=int, help="processes, 1, 2, 4 or 8 (default: as many as there are GPUs, else 2)"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="compare all seven systems of the paper (adds prompted, FLAN, T0), and GRPO, RLOO; three times as long",
    )
    options = parser.parse_args(argv)
    folder, ranks = Path(options.folder), options.ranks or _ranks()
    if ranks not in (1, 2, 4, 8):
        raise UserError(f"--ranks: {ranks} does not divide the demo's batches: use 1, 2, 4 or 8")
    _start_afresh(folder)
    _write_world(folder, options.full)
    timings: dict[str, float] = {}
    for stage in stages(options.full):
        code = _run(stage, folder, ranks, timings)
        if code:
            print(f"gearshift demo: the stage {stage.name} failed", file=sys.stderr)
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
    for name in [*(stage.name for stage in stages(full=True)), "world", "configs", "report"]:
        shutil.rmtree(folder / name, ignore_errors=True)


def _write_world(folder: Path, full: bool) -> None:
    from gearshift.rlhf.toytasks import write_tasks
    from gearshift.rlhf.toyworld import about, write_world

    write_world(folder / "world")
    if full:
        write_tasks(folder / "world")
    _write(folder / "world" / "about.json", about())


def _run(stage: Stage, folder: Path, ranks: int, timings: dict[str, float]) -> int:
    """One stage through its own command, as a person would start it."""
    config = folder / "configs" / f"{stage.config}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    text = (files(__package__) / f"{stage.config}.yaml").read_text(encoding="utf-8")
    config.write_text(text.replace(FOLDER, folder.as_posix()), encoding="utf-8")
    arguments = [str(config), f"--run.ranks={ranks}"]
    if stage.command in ("ppo", "compare"):
        arguments.append(f"--rollout.tp_size={min(2, ranks)}")
    arguments += [f"--{key}={_value(key, value, folder)}" for key, value in stage.settings.items()]
    print(f"\n== {stage.name}: gearshift {stage.command} {' '.join(arguments)}", flush=True)
    start = time.perf_counter()
    code: int = importlib.import_module(f"gearshift.launch.{stage.command}").main(arguments)
    timings[stage.name] = time.perf_counter() - start
    _write(folder / "timings.json", timings)
    return code


def _value(key: str, value: str, folder: Path) -> str:
    return (folder / value).as_posix() if key.endswith((".init", ".folder")) else value


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
