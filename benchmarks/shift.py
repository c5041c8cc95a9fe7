"""The shift against gathering everything, on the same model, in one run; or the plan of a shift, on paper.

    deepspeed --num_accelerators 2 benchmarks/shift.py            (on GPUs: --num_gpus N)
    python benchmarks/shift.py --plan llama-3-70b --ranks 64 --tp 8 --per-host 8 --dtype bf16

Three ways from ZeRO-3 shards to the tensor-parallel slices of every rank, in turn, `--repeats` times; medians, and
the ratio pair by pair:
  shift     `HybridEngine.rollout()`: each rank receives what it lacks
  gathered  all parameters gathered at once on every rank (`deepspeed.zero.GatheredParameters`), then sliced
  layers    the same layer by layer, which bounds the memory

Bytes are those that a rank receives: of the shift as counted in it, of the others what an all-gather of the shards
moves. Peak memory is above the slices and whatever else was there before, the shift's buffers included. Processor time
is all ranks' together, threads of the process group included: what else the machine does is not in it, and where the
wire is a copy by the processor, it tells what the ways cost.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# The repository in place of this folder, whose `kernels` would hide Hugging Face's package of that name.
if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.kernels.command import DTYPES, device_name, versions
from benchmarks.kernels.measuring import peak_bytes
from benchmarks.llama import add_sizes, config_of
from benchmarks.shift_plan import PRESETS, on_paper
from gearshift.engine import HybridEngine, Training, World, init_distributed

GOAL = 2.5  # times faster than gathering everything
WAYS = ("shift", "gathered", "layers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, hidden=768, layers=12, heads=12, vocabulary=32000)
    parser.add_argument("--tp", type=int, help="ranks of a tensor-parallel group; default: all, of a plan 8")
    parser.add_argument("--bucket-mb", type=int, default=64, help="most that a rank sends or receives at once, MiB")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file, and a PNG beside it")
    paper = parser.add_argument_group("the plan alone, without any process group")
    paper.add_argument("--plan", metavar="MODEL", help=f"one of {', '.join(PRESETS)}, or a folder with a config.json")
    paper.add_argument("--ranks", type=int, default=64)
    paper.add_argument("--per-host", type=int, default=8)
    options = parser.parse_args()
    if options.plan:
        on_paper(options)
        return
    world = init_distributed()
    policy = build(options, world)
    figures = measure(options, policy, world)
    if world.is_main:
        report(options, figures)


def build(options: argparse.Namespace, world: World) -> HybridEngine:
    return HybridEngine.load(
        "config",
        world,
        dtype=DTYPES[options.dtype],
        micro_batch_size=1,
        training=Training(learning_rate=1e-5, optimizer="sgd"),
        config=config_of(options),
        tp_size=options.tp or world.size,
        bucket_bytes=options.bucket_mb << 20,
    )


def shift(policy: HybridEngine) -> None:
    policy.steps += 1  # as after an optimizer step: the weights are shifted anew
    with policy.rollout():
        pass


@torch.no_grad()
def gather(policy: HybridEngine, groups: Sequence[Sequence[str]], slices: dict[str, Tensor]) -> None:
    """Each group of parameters whole on every rank, then this rank's slices of it.

    What ZeRO-3 keeps whole between steps is not gathered: leaving the context would cut it up, which no training step
    does, and the shift that follows would have to bring it back.
    """
    import deepspeed

    splits, part = policy._replica.layout.splits, policy.group.rank
    parameters = dict(policy.module.named_parameters())
    for names in groups:
        with deepspeed.zero.GatheredParameters([parameters[n] for n in names if not parameters[n].ds_persist]):
            for name in names:
                slices[name].copy_(splits[name].cut(parameters[name].data, part))


def by_layer(module: nn.Module) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name, _ in module.named_parameters():
        layer = re.match(r".*?\.\d+\.", name)
        groups.setdefault(layer[0] if layer else name, []).append(name)
    return list(groups.values())


def measure(options: argparse.Namespace, policy: HybridEngine, world: World) -> dict[str, Any]:
    shift(policy)  # builds the replica and its plan
    ours = policy._replica.slices
    theirs = {name: torch.zeros_like(tensor) for name, tensor in ours.items()}
    everything, layers = [list(ours)], by_layer(policy.module)
    ways: dict[str, Callable[[], None]] = {
        "shift": lambda: shift(policy),
        "gathered": lambda: gather(policy, everything, theirs),
        "layers": lambda: gather(policy, layers, theirs),
    }
    turns = timed(ways, options.repeats, world)
    cut_up = [p for p in policy.module.parameters() if not p.ds_persist]
    size, plan = policy.dtype.itemsize, policy._shift.plan
    gathered = sum(p.ds_tensor.numel() * (world.size - 1) for p in cut_up) * size
    own = {
        "bytes_received": {"shift": policy.shift_bytes, "gathered": gathered, "layers": gathered},
        "bytes_lacking": int(plan.traffic().received[world.rank]) * size,
        "buffer_bytes": plan.peak(world.rank) * size,
        "peak_bytes": {name: peak(way, policy, world) for name, way in ways.items()},
        "different": [name for name in ours if not torch.equal(ours[name], theirs[name])],
    }
    ranks: list[Any] = [None] * world.size
    dist.all_gather_object(ranks, own)
    return {
        "device": device_name(world.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "ranks": world.size,
        "tp": policy.group.size,
        "parameters": policy.parameters_total,
        "kept_whole": policy.parameters_total - sum(p.ds_numel for p in cut_up),
        "exchanges": len(plan.buckets),
        "per_rank": ranks,
        "options": {k: str(v) for k, v in vars(options).items() if k not in ("local_rank", "out")},
    } | turns


def timed(ways: Mapping[str, Callable[[], None]], repeats: int, world: World) -> dict[str, dict[str, list[float]]]:
    """Seconds of each way, from all ranks ready to all done, and of processors, in turn A B C A B C ..., after one
    warm-up of each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            synchronize(world)
            start, busy = time.perf_counter(), time.process_time()
            way()
            synchronize(world)
            spent = torch.tensor(time.process_time() - busy, dtype=torch.float64, device=world.device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(float(world.sum(spent)))
    return {"seconds": seconds, "processor_seconds": processor}


def synchronize(world: World) -> None:
    if world.device.type != "cpu":
        torch.accelerator.synchronize()
    dist.barrier()


def peak(way: Callable[[], None], policy: HybridEngine, world: World) -> int | None:
    policy._shift.buffers.release()
    dist.barrier()
    return peak_bytes(way, world.device)


# --- report ----------------------------------------------------------------------------------------------------------


def report(options: argparse.Namespace, found: dict[str, Any]) -> None:
    rows = {name: row(found, name) for name in WAYS}
    print(f"{found['parameters'] / 1e6:.1f} M parameters in {options.dtype}, {found['ranks']} ranks, tensor parallel "
          f"{found['tp']}; {found['device']}, {found['threads']} threads a rank")  # fmt: skip
    print(f"{'':<10}{'ms':>9}{'min':>9}{'max':>9}{'/ shift':>9}{'CPU ms':>9}{'/ shift':>9}{'MiB received':>14}"
          f"{'peak MiB':>10}")  # fmt: skip
    for name, r in rows.items():
        print(f"{name:<10}{r['ms']:9.1f}{r['min']:9.1f}{r['max']:9.1f}{r['over']:9.2f}{r['cpu_ms']:9.1f}"
              f"{r['cpu_over']:9.2f}{r['received'] / 2**20:14.1f}{(r['peak'] or 0) / 2**20:10.1f}")  # fmt: skip
    ranks, faster = found["per_rank"], rows["gathered"]["over"]
    found["figures"] = [
        {"figure": figure, "holds": holds}
        for holds, figure in (
            (not any(r["different"] for r in ranks), "all ways give the same slices, bit for bit"),
            (
                all(r["bytes_received"]["shift"] == r["bytes_lacking"] for r in ranks),
                "every rank received the bytes that it lacks, and no more",
            ),
            (faster >= GOAL, f"shift at least {GOAL} times faster than gathering everything: {faster:.2f}"),
        )
    ]
    for figure in found["figures"]:
        print(f"{'holds' if figure['holds'] else 'MISSED':<8}{figure['figure']}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
        draw(found, rows, options.out.with_suffix(".png"))


def row(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A way's figures: times in ms, bytes of the rank that has most."""

    def over(of: str) -> float:
        return statistics.median(a / b for a, b in zip(found[of][name], found[of]["shift"], strict=True))

    seconds, ranks = found["seconds"][name], found["per_rank"]
    return {
        "ms": statistics.median(seconds) * 1e3,
        "min": min(seconds) * 1e3,
        "max": max(seconds) * 1e3,
        "over": over("seconds"),
        "cpu_ms": statistics.median(found["processor_seconds"][name]) * 1e3,
        "cpu_over": over("processor_seconds"),
        "received": max(r["bytes_received"][name] for r in ranks),
        "peak": max((r["peak_bytes"][name] for r in ranks if r["peak_bytes"][name] is not None), default=None),
    }


def draw(found: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.6))
    for axes, key, unit, title in zip(
        panels, ("ms", "received", "peak"), (1, 2**-20, 2**-20), ("time, ms", "received, MiB", "peak memory, MiB"),
        strict=True,
    ):  # fmt: skip
        values = [(rows[name][key] or 0) * unit for name in WAYS]
        bars = axes.bar(WAYS, values, color=("#d62728", "#1f77b4", "#2ca02c"), width=0.6)
        axes.bar_label(bars, [f"{value:,.0f}" for value in values])
        axes.set_title(f"{title} (a rank)" if key != "ms" else title, fontsize=11)
        axes.set_ylim(0, max(values) * 1.15)
        axes.grid(True, axis="y", alpha=0.3)
    figure.suptitle(
        f"{found['parameters'] / 1e6:.0f} M parameters in {found['options']['dtype']}, {found['ranks']} ranks, "
        f"tensor parallel {found['tp']}\n{found['device']}", fontsize=11,
    )  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
