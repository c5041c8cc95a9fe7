"""The shift against gathering everything, on the same model, in one run; or the plan of a shift, on paper.

    deepspeed --num_accelerators 2 benchmarks/shift.py            (on GPUs: --num_gpus N)
    python benchmarks/shift.py --plan llama-3-70b --ranks 64 --tp 8 --per-host 8

Three ways from ZeRO-3 shards to the tensor-parallel slices of every rank, in turn, `--repeats` times; medians, and
the ratio pair by pair:
  shift     `HybridEngine.rollout()`: each rank receives what it lacks
  gathered  all parameters gathered at once on every rank (`deepspeed.zero.GatheredParameters`), then sliced
  layers    the same layer by layer, which bounds the memory

Bytes are those that a rank receives: counted in the shift, for the others what an all-gather of shards moves. Peak
memory is above the slices and whatever else was there before, the shift's buffers included.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# The repository in place of this folder, whose `kernels` would hide Hugging Face's package of that name.
if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig

from benchmarks.kernels.command import DTYPES, device_name, versions
from benchmarks.kernels.measuring import peak_bytes
from gearshift.engine import HybridEngine, Training, World, init_distributed

GOAL = 2.5  # times faster than gathering everything
WAYS = ("shift", "gathered", "layers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--tp", type=int, help="ranks of a tensor-parallel group; default: all")
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file, and a PNG beside it")
    paper = parser.add_argument_group("the plan alone, without any process group")
    paper.add_argument("--plan", metavar="MODEL", help="a preset (llama-3-8b, -70b, -405b), or a folder with a config")
    paper.add_argument("--ranks", type=int, default=64)
    paper.add_argument("--per-host", type=int, default=8)
    options = parser.parse_args()
    if options.plan:
        from benchmarks.shift_plan import on_paper

        on_paper(options)
        return
    world = init_distributed()
    policy = build(options, world)
    figures = measure(options, policy, world)
    if world.is_main:
        report(options, figures)


def build(options: argparse.Namespace, world: World) -> HybridEngine:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads or options.heads,
    )
    return HybridEngine.load(
        "config",
        world,
        dtype=DTYPES[options.dtype],
        micro_batch_size=1,
        training=Training(learning_rate=1e-5, optimizer="sgd"),
        config=config,
        tp_size=options.tp or world.size,
        bucket_bytes=options.bucket_mb << 20,
    )


def shift(policy: HybridEngine) -> None:
    policy.steps += 1  # as after an optimizer step: the weights are shifted anew
    with policy.rollout():
        pass


@torch.no_grad()
def gather(policy: HybridEngine, groups: Sequence[Sequence[str]], slices: dict[str, Tensor]) -> None:
    """Each group of parameters whole on every rank, then this rank's slices of it."""
    import deepspeed

    splits, part = policy._replica.layout.splits, policy.group.rank
    parameters = dict(policy.module.named_parameters())
    for names in groups:
        with deepspeed.zero.GatheredParameters([parameters[name] for name in names]):
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
    names = [[name for name, _ in policy.module.named_parameters()]]
    layers = by_layer(policy.module)
    ways: dict[str, Callable[[], None]] = {
        "shift": lambda: shift(policy),
        "gathered": lambda: gather(policy, names, theirs),
        "layers": lambda: gather(policy, layers, theirs),
    }
    seconds = timed(ways, options.repeats, world)
    kept = [p for p in policy.module.parameters() if p.ds_persist]
    received = policy._shift.plan.traffic().received[world.rank] * policy.dtype.itemsize
    whole = sum(p.ds_tensor.numel() * (world.size - 1) for p in policy.module.parameters() if not p.ds_persist)
    peaks = {name: peak(way, policy, world) for name, way in ways.items()}
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    own = {
        "bytes_received": {"shift": policy.shift_bytes, "gathered": whole * policy.dtype.itemsize},
        "bound": int(received),
        "peak_bytes": peaks,
        "buffer_bytes": policy._shift.plan.peak(world.rank) * policy.dtype.itemsize,
        "different": different,
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
        "kept_whole": sum(p.ds_numel for p in kept),
        "exchanges": len(policy._shift.plan.buckets),
        "seconds": seconds,
        "per_rank": ranks,
        "options": {k: str(v) for k, v in vars(options).items() if k not in ("local_rank", "plan", "per_host")},
    }


def timed(ways: dict[str, Callable[[], None]], repeats: int, world: World) -> dict[str, list[float]]:
    """Seconds of each way, from all ranks ready to all done, in turn A B C A B C ..., after one warm-up of each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            synchronize(world)
            start = time.perf_counter()
            way()
            synchronize(world)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


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
    seconds = found["seconds"]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    over = {
        name: statistics.median(other / own for other, own in zip(seconds[name], seconds["shift"], strict=True))
        for name in WAYS[1:]
    }
    ranks = found["per_rank"]
    received = {
        name: max(r["bytes_received"]["shift" if name == "shift" else "gathered"] for r in ranks) for name in WAYS
    }
    peaks = {name: max((r["peak_bytes"][name] or 0) for r in ranks) for name in WAYS}
    found |= {"medians": medians, "over": over, "most_bytes_received": received, "most_peak_bytes": peaks}
    print(f"{found['parameters'] / 1e6:.1f} M parameters in {options.dtype}, {found['ranks']} ranks, tensor parallel "
          f"{found['tp']}; {found['device']}, {found['threads']} threads a rank")  # fmt: skip
    print(f"{'':<10} {'ms':>9} {'min':>9} {'max':>9} {'MiB received':>13} {'peak MiB':>9}   / shift")
    for name in WAYS:
        ratio = f"{over[name]:8.2f}" if name in over else ""
        print(f"{name:<10} {medians[name] * 1e3:9.1f} {min(seconds[name]) * 1e3:9.1f} {max(seconds[name]) * 1e3:9.1f} "
              f"{received[name] / 2**20:13.1f} {peaks[name] / 2**20:9.1f} {ratio}")  # fmt: skip
    exact = all(r["bytes_received"]["shift"] == r["bound"] for r in ranks)
    same = not any(r["different"] for r in ranks)
    for holds, what in (
        (same, "all ways give the same slices, bit for bit"),
        (exact, "every rank received the bytes that it lacks, and no more"),
        (over["gathered"] >= GOAL, f"shift {GOAL}x faster than gathering everything: {over['gathered']:.2f}x"),
    ):
        print(f"{'holds' if holds else 'MISSED':<8}{what}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        draw(found, options.out.with_suffix(".png"))


def draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")


if __name__ == "__main__":
    main()
