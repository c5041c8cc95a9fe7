"""One iteration of PPO (generation, scores by reference, reward model and critic, both updates), against other ways.

    python benchmarks/ppo_step.py --out runs/benchmarks/ppo-step.json

In turn, `--repeats` times, on the same random model and the same prompts; medians, and ratios within a turn:
  gearshift        `Ppo.iteration`, one process with all threads
  gearshift-zero3  the same under ZeRO-3, `--processes` of them, tensor-parallel rollouts over all
  trl              TRL 0.24's PPOTrainer, one process with all threads
  trl-zero3        the same under ZeRO-3, weights gathered for generation
  plain-zero3      DeepSpeed as DeepSpeed-Chat's step 3 uses it: `generate` on the actor's ZeRO-3 engine
TRL runs in an environment of its own (runs/benchmarks/trl), which the first run makes with pip. No answer ends before
its last token, so that every way makes the same number. Each way's processes are started once and wait for their turn
without work. Peak memory is that of the process that holds most (VmHWM), from when its models are loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

# The repository in place of this folder, whose `kernels` would hide Hugging Face's package of that name.
if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.peers import table, trl_environment
from benchmarks.peers.processes import Turn, Way, WorkerError, free_builds, machine_cpu_seconds
from benchmarks.peers.setting import Setting, make

WAYS = ("gearshift", "gearshift-zero3", "trl", "trl-zero3", "plain-zero3")
BUSY = 0.05  # of a core, while others have their turn: more disturbs them
ELSEWHERE = 0.1  # of all cores, by whatever else runs on the machine


def main() -> int:
    options = arguments()
    signal.signal(signal.SIGTERM, end)
    setting = Setting(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Setting)})
    folder = Path(tempfile.mkdtemp(prefix="gearshift-ppo-step-", dir=options.folder))
    try:
        free_builds()
        parameters = make(setting, folder)
        result = {"setting": dataclasses.asdict(setting), "parameters": parameters, "processes": options.processes}
        measured = measure(options, folder)
        if not measured["ways"]:
            return 1
        tell(result | measured, setting, options)
    finally:
        shutil.rmtree(folder)
    return 0


def end(number: int, _: object) -> None:
    """Cleans up on the way out; a second signal does not stop that."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    for field in dataclasses.fields(Setting):
        kind = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    parser.add_argument("--processes", type=int, default=2, help="of each way under ZeRO-3")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2, help="iterations of each way before the timed ones")
    parser.add_argument("--folder", type=Path, help="where models and logs lie meanwhile; default: for temporary files")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file, and a PNG beside it")
    options = parser.parse_args()
    for count in (options.processes, 1):
        if options.episodes % count or (rows := options.episodes // count) % min(options.micro_batch, rows):
            parser.error(f"--episodes {options.episodes}: {count} processes cannot share them in whole micro-batches "
                         f"of {options.micro_batch}")  # fmt: skip
    return options


def command(way: str, folder: Path) -> list[str]:
    """What starts one process of a way. Raises EnvironmentMissing."""
    module = {"gearshift": "gearshift_worker", "trl": "trl_worker", "plain": "plain_zero3"}[way.partition("-")[0]]
    python = trl_environment.python() if module == "trl_worker" else sys.executable
    return [python, "-m", f"benchmarks.peers.{module}", str(folder)]


def start(options: argparse.Namespace, folder: Path, ways: dict[str, Way], left_out: dict[str, str]) -> dict[str, Any]:
    """Starts the processes of all ways, one way after the other, so that loading does not disturb loading."""
    loaded = {}
    for name in options.ways:
        try:
            words = command(name, folder)
            ways[name] = Way(name, words, options.processes if name.endswith("zero3") else 1, folder)
            loaded[name] = ways[name].loaded()
            for _ in range(options.warm_up):
                ways[name].turn()
        except (trl_environment.EnvironmentMissing, WorkerError) as error:
            left_out[name] = str(error)
            if name in ways:
                ways.pop(name).stop()
            print(f"left out: {name}: {error}", flush=True)
        else:
            print(f"{name}: ready", flush=True)
    return loaded


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every way's turns, medians, ratios; and what the others' processes did meanwhile."""
    ways: dict[str, Way] = {}
    left_out: dict[str, str] = {}
    try:
        loaded = start(options, folder, ways, left_out)
        turns: dict[str, list[Turn]] = {name: [] for name in ways}
        busy = dict.fromkeys(ways, 0.0)
        elsewhere = Elsewhere(ways.values())
        for number in range(options.repeats):
            for name, way in ways.items():
                others = [other for other in ways if other != name]
                before, since = {other: ways[other].cpu_seconds() for other in others}, time.perf_counter()
                turns[name].append(way.turn())
                passed = time.perf_counter() - since
                for other in others:
                    busy[other] = max(busy[other], (ways[other].cpu_seconds() - before[other]) / passed)
            print(f"turn {number + 1}: " + ", ".join(f"{n} {t[-1].total:.2f} s" for n, t in turns.items()), flush=True)
        taken_elsewhere = elsewhere.share()
    finally:
        for way in ways.values():
            way.stop()
    return {
        "ways": {name: table.row(taken, options.episodes, options.new_tokens) for name, taken in turns.items()},
        "ratios": table.ratios(turns),
        "left_out": left_out,
        "loaded": {name: loaded[name] for name in ways},
        "busy_while_idle": busy,
        "elsewhere": taken_elsewhere,
    }


class Elsewhere:
    """What is taken of this machine by processes that are not of the ways, from now on."""

    def __init__(self, ways: Collection[Way]):
        self.ways, self.since = ways, time.perf_counter()
        self.before = self._cpu_seconds()

    def share(self) -> float:
        """Of all cores."""
        passed = (time.perf_counter() - self.since) * (os.cpu_count() or 1)
        return max(0.0, self._cpu_seconds() - self.before) / passed

    def _cpu_seconds(self) -> float:
        return machine_cpu_seconds() - sum(way.cpu_seconds() for way in self.ways)


def tell(result: dict[str, Any], setting: Setting, options: argparse.Namespace) -> None:
    import torch

    from benchmarks.kernels.command import commit, device_name, versions

    about = {"device": device_name(torch.device("cpu")), "versions": versions(), "commit": commit()}
    result = about | result
    result["title"] = (
        f"One iteration of PPO: policy of {result['parameters']['policy'] / 1e6:.1f} M parameters, vocabulary "
        f"{setting.vocabulary:,}, {setting.episodes} episodes of\n{setting.prompt_tokens} + {setting.new_tokens} "
        f"tokens, fp32; ZeRO-3 with {options.processes} processes; {result['device']}"
    )
    told: Sequence[str] = [
        "", result["title"], *table.lines(result["ways"]), "",
        *table.ratio_lines(result["ratios"]), "", table.DIFFERENCES, "",
        *table.verdicts(result["ratios"], setting.vocabulary),
        *(f"NOTE    {name} was busy for {share:.0%} of a core while others had their turn"
          for name, share in result["busy_while_idle"].items() if share > BUSY),
        *(f"NOTE    {name}: this system does not reset VmHWM: its peak includes loading"
          for name, answers in result["loaded"].items() if not all(a["peak_reset"] for a in answers)),
        *([f"NOTE    other work took {result['elsewhere']:.0%} of this machine: times are longer than they would be, "
           "and unequally so; CPU time says more"] if result["elsewhere"] > ELSEWHERE else []),
        *(f"left out: {name}: {why}" for name, why in result["left_out"].items()),
    ]  # fmt: skip
    print("\n".join(told), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        table.draw(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
