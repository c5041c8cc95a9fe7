"""Decoding on one device: a step at a time as it comes, replayed from CUDA graphs, and through flash-attn.

    python benchmarks/decode.py [--rows 1 32 256]

The ways, in turn, `--repeats` times; all draw at temperature 1 without an EOS, with the same weights:
  transformers  its own `generate`, with its cache and SDPA
  eager         Gearshift's generator, every kernel launched from Python
  graphs        the same, steps replayed from CUDA graphs (on a GPU)
  flash         the same as graphs, its attention flash-attn's (on a GPU, where it is installed)

What is told is of decoding alone: the time of `--new-tokens` tokens less the time of one, which is that of the prompts.
The floor is what it takes to read the weights and the keys and values once a step, at the speed at which this device
copies a large tensor.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The repository in place of this folder, whose `kernels` would hide Hugging Face's package of that name.
if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers import AutoModelForCausalLM

from benchmarks.kernels.command import DTYPES
from benchmarks.llama import add_sizes, config_of
from gearshift.engine import Prompts, Sampling, World
from gearshift.engine.decoder import CudaGraphs
from gearshift.engine.distributed import now
from gearshift.engine.flash import flash_kernel
from gearshift.engine.generator import Generator
from gearshift.engine.replica import Replica
from gearshift.engine.room import position_bytes
from gearshift.engine.tensor_parallel import TensorParallelGroup

Way = Callable[[Prompts, int], None]

STAMP = (0, False)  # the weights are of no training: they never change


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, hidden=2048, layers=22, heads=32, vocabulary=32000)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256], help="sequences decoded at once")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    world = World(0, 1, 0, 1, device)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(options), dtype=DTYPES[options.dtype]).to(device).eval()
    ways, replicas = ways_of(model, world)
    speed = copy_speed(device)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes_per_second": speed,
        "options": {k: str(v) for k, v in vars(options).items() if k not in ("local_rank", "out")},
        "rows": [],
    }
    print(f"{found['device']}: {found['parameters'] / 1e6:,.0f} M parameters in {options.dtype}, prompts of "
          f"{options.prompt_tokens} tokens, {options.new_tokens} new; copies at {speed / 1e9:,.0f} GB/s")  # fmt: skip
    print(f"{'rows':>5} {'way':<13}{'tokens/s':>11}{'ms a step':>11}{'min':>9}{'max':>9}{'of the floor':>14}")
    for rows in options.rows:
        floor = floor_seconds(model, rows, options, speed)
        for name, steps in measure(ways, rows, options, device).items():
            found["rows"].append(tell(rows, name, steps, floor))
    for name, replica in replicas.items():
        found[f"capture_seconds_{name}"] = replica.decoder.seconds
        if replica.decoder.seconds:
            print(f"{name}: {replica.decoder.seconds:.2f} s for capturing, in all")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def ways_of(model: Any, world: World) -> tuple[dict[str, Way], dict[str, Replica]]:
    group, on_gpu = TensorParallelGroup(world, 1), world.device.type == "cuda"
    settings: dict[str, tuple[Any, ...]] = {"eager": ()}
    if on_gpu:
        settings["graphs"] = (CudaGraphs,)
        if importlib.util.find_spec("flash_attn") and model.dtype != torch.float32:
            settings["flash"] = (CudaGraphs, flash_kernel(model.dtype, world.device))
    replicas = {name: Replica(model.config, group, model.dtype, world.device, *more) for name, more in settings.items()}
    ways: dict[str, Way] = {"transformers": lambda prompts, new: generate(model, prompts, new)}
    for name, replica in replicas.items():
        fill(replica, model)
        ways[name] = lambda prompts, new, replica=replica: roll_out(replica, world, prompts, new)  # type: ignore[misc]
    return ways, replicas


@torch.no_grad()
def fill(replica: Replica, model: Any) -> None:
    weights = dict(model.named_parameters())
    for name, own in replica.slices.items():
        own.copy_(weights[name])
    replica.stamp = STAMP


@torch.no_grad()
def generate(model: Any, prompts: Prompts, new_tokens: int) -> None:
    model.generate(
        prompts.tokens, do_sample=True, top_k=0, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0
    )


def roll_out(replica: Replica, world: World, prompts: Prompts, new_tokens: int) -> None:
    generator = Generator(replica, world, None, STAMP)
    generator.generate(prompts, Sampling(new_tokens, eos_ids=()))


def measure(
    ways: dict[str, Way], rows: int, options: argparse.Namespace, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of a step of each way, in turn A B C A B C ..., after one warm-up of each."""
    row = torch.arange(rows)
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, options.vocabulary, (rows, options.prompt_tokens), generator=rng)
    lengths = torch.full_like(row, options.prompt_tokens)
    prompts = Prompts(tokens, lengths, row, row, torch.zeros_like(row)).to(device)
    steps: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.repeats + 1):
        for name, way in ways.items():
            start = now(device)
            way(prompts, options.new_tokens)
            middle = now(device)
            way(prompts, 1)
            if turn:
                steps[name].append((2 * middle - start - now(device)) / (options.new_tokens - 1))
    return steps


def copy_speed(device: torch.device) -> float:
    """Bytes read and written a second."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(10):
        start = now(device)
        target.copy_(source)
        seconds.append(now(device) - start)
    return 2 * source.nbytes / min(seconds)


def floor_seconds(model: Any, rows: int, options: argparse.Namespace, speed: float) -> float:
    """Of a step in the middle of the answers. Of the embedding a step reads only a few rows."""
    embedding = model.get_input_embeddings().weight
    weights = sum(p.nbytes for p in model.parameters() if p is not embedding)
    columns = options.prompt_tokens + options.new_tokens / 2
    return float(weights + rows * columns * position_bytes(model.config, 1, model.dtype)) / speed


def tell(rows: int, name: str, steps: list[float], floor: float) -> dict[str, Any]:
    step = statistics.median(steps)
    print(f"{rows:5} {name:<13}{rows / step:11,.0f}{step * 1e3:11.3f}{min(steps) * 1e3:9.3f}{max(steps) * 1e3:9.3f}"
          f"{floor / step:14.2f}")  # fmt: skip
    return {
        "rows": rows, "way": name, "tokens_per_second": rows / step, "step_seconds": step, "all_seconds": steps,
        "floor_seconds": floor,
    }  # fmt: skip


if __name__ == "__main__":
    main()
