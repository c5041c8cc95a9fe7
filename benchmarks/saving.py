"""What training waits for while a checkpoint is saved, beside DeepSpeed's plain `save_checkpoint`, in one run.

    deepspeed --num_accelerators 2 benchmarks/saving.py --folder DISK            (on GPUs: --num_gpus N)

A random Llama with AdamW's moments, saved in turn, `--repeats` times; medians, and the ratio to DeepSpeed's pair by
pair:
  deepspeed    `engine.save_checkpoint` under a new name: its files, as the operating system caches them
  ... flushed  the same, and its files on the disk (fsync), which it does not do itself
  gearshift    `Checkpoints.save`: the same files digested, on the disk, renamed, the pointer moved
  background   the same with `checkpoint.background`: until training may go on; when the step is there is told apart
Bytes are those of the last step's folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The repository in place of this folder, whose `kernels` would hide Hugging Face's package of that name.
if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist

from benchmarks.kernels.command import DTYPES, device_name, versions
from benchmarks.llama import add_sizes, config_of
from gearshift.engine import CausalModel, TokenBatch, Training, World, init_distributed
from gearshift.engine.checkpoints import files
from gearshift.engine.checkpoints.manifest import Manifest
from gearshift.engine.checkpoints.writing import Checkpoints
from gearshift.rlhf.language import language_loss

WAYS = ("deepspeed", "... flushed", "gearshift", "background")
SETTLING = 1.0  # seconds after the disk has nothing to write any more: it may still be freeing blocks
GOALS = {"gearshift": 1.25, "background": 0.3}  # times DeepSpeed's, at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, hidden=768, layers=12, heads=12, vocabulary=32000)
    parser.add_argument("--folder", type=Path, help="where to write; default: the folder for temporary files")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    world = init_distributed()
    shared: list[Any] = [tempfile.mkdtemp(prefix="gearshift-saving-", dir=options.folder) if world.is_main else None]
    dist.broadcast_object_list(shared, src=0)
    folder = Path(shared[0])
    try:
        found = measure(options, folder, world)
        if world.is_main:
            report(options, found)
    finally:
        dist.barrier()
        if world.is_main:
            shutil.rmtree(folder)


def build(options: argparse.Namespace, world: World) -> CausalModel:
    """After one step, so that there are moments to save."""
    training = Training(learning_rate=1e-5)
    how = {"dtype": DTYPES[options.dtype], "micro_batch_size": 1, "training": training}
    model = CausalModel.load("config", world, config=config_of(options), **how)
    tokens = torch.randint(0, options.vocabulary, (1, 17), device=world.device)
    model.accumulate(language_loss, TokenBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
    model.step()
    return model


def measure(options: argparse.Namespace, folder: Path, world: World) -> dict[str, Any]:
    model = build(options, world)
    plain, safe, aside = (folder / name for name in ("deepspeed", "gearshift", "background"))
    ours = Checkpoints(safe, world, 1)
    later = Checkpoints(aside, world, 1, background=True)
    step = iter(range(1, 10**6))

    def save(checkpoints: Checkpoints) -> None:
        manifest = Manifest("sft", next(step), world.size, 1, {}, {}, {})
        checkpoints.save(manifest, {"model": model})

    def deepspeed(flush: bool) -> None:
        model.engine.save_checkpoint(str(plain), f"step-{next(step)}", save_latest=True)
        if flush:
            newest = plain / (plain / "latest").read_text()
            for path in newest.glob(f"*rank_{world.rank}_*.pt"):
                files.flush(path)

    def remove_old() -> None:
        """All but the newest step of each way."""
        for checkpoints in (ours, later):
            checkpoints.close()
        if world.is_main and plain.exists():
            kept = (plain / "latest").read_text()
            for old in [path for path in plain.glob("step-*") if path.name != kept]:
                shutil.rmtree(old)

    ways: dict[str, Callable[[], None]] = {
        "deepspeed": lambda: deepspeed(False),
        "... flushed": lambda: deepspeed(True),
        "gearshift": lambda: save(ours),
        "background": lambda: save(later),
    }
    seconds, whole = timed(ways, {"gearshift": ours, "background": later}, remove_old, options.repeats, world)
    return {
        "device": device_name(world.device),
        "versions": versions(),
        "ranks": world.size,
        "parameters": model.parameters_total,
        "dtype": options.dtype,
        "seconds": seconds,
        "until_there": whole,
        "bytes": {"deepspeed": size_of(plain), "gearshift": size_of(safe), "background": size_of(aside)},
    }


def timed(
    ways: dict[str, Callable[[], None]],
    checkpoints: dict[str, Checkpoints],
    between: Callable[[], None],
    repeats: int,
    world: World,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each way until every rank goes on, in turn, after a warm-up of each; and of `checkpoints` until the
    step is there. Each begins when the disk has nothing to do any more."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    whole: dict[str, list[float]] = {name: [] for name in checkpoints}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            if world.is_main:
                os.sync()
            time.sleep(SETTLING)
            dist.barrier()
            start = time.perf_counter()
            way()
            dist.barrier()
            taken = time.perf_counter() - start
            if name in checkpoints:
                checkpoints[name].finish()
            dist.barrier()
            there = time.perf_counter() - start
            between()
            if turn:
                seconds[name].append(taken)
                if name in whole:
                    whole[name].append(there)
    return seconds, whole


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def report(options: argparse.Namespace, found: dict[str, Any]) -> None:
    seconds, base = found["seconds"], found["seconds"]["deepspeed"]
    ratios = {name: statistics.median(a / b for a, b in zip(seconds[name], base, strict=True)) for name in WAYS}
    print(
        f"{found['parameters'] / 1e6:.1f} M parameters in {found['dtype']}, {found['ranks']} ranks; {found['device']}"
    )
    print(f"{'':<14}{'s':>8}{'min':>8}{'max':>8}{'/ deepspeed':>13}{'MiB':>10}")
    for name in WAYS:
        size = found["bytes"].get(name)
        print(f"{name:<14}{statistics.median(seconds[name]):8.2f}{min(seconds[name]):8.2f}{max(seconds[name]):8.2f}"
              f"{ratios[name]:13.2f}{'' if size is None else f'{size / 2**20:10.1f}'}")  # fmt: skip
    for name, times in found["until_there"].items():
        print(f"{name}: the step is there after {statistics.median(times):.2f} s")
    found["ratios"] = ratios
    for name, goal in GOALS.items():
        holds = "holds" if ratios[name] <= goal else "MISSED"
        print(f"{holds:<8}{name}: training waits {ratios[name]:.2f} times as long as for DeepSpeed, {goal} at most")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
