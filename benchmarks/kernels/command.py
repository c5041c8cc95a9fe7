"""The command line that all of these benchmarks share, and what a figure has to be read with: where it was measured."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FOLDER = Path("runs/benchmarks/kernels")
PACKAGES = ("torch", "triton", "numpy", "liger-kernel", "flash-attn")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parser(description: str) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arguments.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    arguments.add_argument("--repeats", type=int, help="timed runs of each variant")
    arguments.add_argument(
        "--compile-limit", type=float, default=60, help="seconds for torch.compile to take; 0: without it"
    )
    arguments.add_argument("--out", type=Path, help=f"JSON file; a PNG goes beside it; default {FOLDER}/NAME.json")
    heads = arguments.add_argument_group("linear_logprob, linear_kl")
    heads.add_argument("--tokens", type=int)
    heads.add_argument("--hidden", type=int)
    heads.add_argument("--vocabularies", type=int, nargs="+")
    heads.add_argument("--dtype", choices=list(DTYPES), help="default: fp32 on a CPU, bf16 on a GPU")
    batches = arguments.add_argument_group("ppo_targets, policy_loss, value_loss")
    batches.add_argument("--sequences", type=int, default=512)
    batches.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    steps = arguments.add_argument_group("few_rows_linear, decode_attention")
    steps.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 32, 64])
    return arguments


def parse(description: str, on_cpu: int = 20, on_gpu: int = 20) -> argparse.Namespace:
    """The options, those that depend on the device filled in; repeats as here unless given."""
    options = parser(description).parse_args()
    options.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cpu = options.device.type == "cpu"
    options.repeats = options.repeats or (on_cpu if cpu else on_gpu)
    options.tokens = options.tokens or (2048 if cpu else 8192)
    options.hidden = options.hidden or (768 if cpu else 4096)
    options.vocabularies = options.vocabularies or ([8192, 32768, 50257] if cpu else [32000, 128256, 151936])
    options.dtype = DTYPES[options.dtype or ("fp32" if cpu else "bf16")]
    return options


@contextmanager
def one_thread() -> Iterator[None]:
    """As each of several ranks on one machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def circumstances(operation: str, device: torch.device, repeats: int) -> dict[str, Any]:
    return {
        "operation": operation,
        "command": command(operation),
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # of the minute before: what else this machine was busy with
        "repeats": repeats,
        "commit": commit(),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda} | versions(),
    }


def command(operation: str) -> str:
    """As typed, but for where the results went, which says nothing of them."""
    words = iter(sys.argv[1:])
    kept = [word for word in words if not (word == "--out" and next(words, None)) and not word.startswith("--out=")]
    return shlex.join(["python", "-m", f"benchmarks.kernels.{operation}", *kept])


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def commit() -> str | None:
    """None outside of a git checkout."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
