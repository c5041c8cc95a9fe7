"""Host memory while a model is loaded under ZeRO-3: per rank, the peak above what the process had before.

    deepspeed --num_accelerators 2 benchmarks/loading.py            (on GPUs: --num_gpus N)

A random Llama of `--millions` parameters is written in safetensors files of `--file-mb`, then loaded by
`CausalModel.load`. The bound to hold: one file plus the rank's own shard, on rank 0, which alone reads the files.
Peak resident set (VmHWM), which counts pages of a mapped file as they are read.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path.pop(0)  # `kernels` of this folder would hide Hugging Face's package of that name from transformers

import torch
import torch.distributed as dist

from gearshift.engine import CausalModel, World, init_distributed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    parser.add_argument("--millions", type=int, default=400)
    parser.add_argument("--file-mb", type=int, default=200)
    options = parser.parse_args()
    world = init_distributed()
    shared: list[str | None] = [write_model(options) if world.is_main else None]
    dist.broadcast_object_list(shared, src=0)
    folder = Path(str(shared[0]))
    try:
        warm_up(world)
        report(world, folder)
    finally:
        dist.barrier()
        if world.is_main:
            shutil.rmtree(folder)


def write_model(options: argparse.Namespace) -> str:
    """Written by a process of its own, so that its memory is not in rank 0's."""
    folder = tempfile.mkdtemp(prefix="gearshift-loading-")
    code = f"""
from transformers import AutoConfig, AutoModelForCausalLM
hidden = 1024
layers = max(1, {options.millions} * 10**6 // (4 * hidden**2 + 3 * hidden * 2816))
config = AutoConfig.for_model("llama", vocab_size=8192, hidden_size=hidden, intermediate_size=2816,
                              num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16)
AutoModelForCausalLM.from_config(config).save_pretrained({folder!r}, max_shard_size="{options.file_mb}MB")
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return folder


def warm_up(world: World) -> None:
    """Everything that the first load imports and allocates, whatever the model's size."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    CausalModel.load("config", world, dtype=torch.float32, micro_batch_size=1, config=config)


def memory_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {field} in /proc/self/status")


def report(world: World, folder: Path) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = memory_mb("VmRSS")
    model = CausalModel.load(str(folder), world, dtype=torch.float32, micro_batch_size=1)
    peak, after = memory_mb("VmHWM") - before, memory_mb("VmRSS") - before
    shard = sum(p.ds_tensor.numel() * 4 for p in model.module.parameters()) / 2**20
    files = sorted(f.stat().st_size / 2**20 for f in folder.glob("*.safetensors"))
    line = f"rank {world.rank}: peak {peak:,.0f} MiB, after {after:,.0f} MiB; shard {shard:,.0f} MiB"
    lines: list[str | None] = [None] * world.size
    dist.all_gather_object(lines, line)
    if world.is_main:
        bound = files[-1] + shard
        print(f"{model.parameters_total / 1e6:,.0f} M parameters, {sum(files):,.0f} MiB in {len(files)} files")
        print("\n".join(str(text) for text in lines))
        print(f"bound for rank 0: the largest file {files[-1]:,.0f} MiB + its shard = {bound:,.0f} MiB: "
              f"{'holds' if peak <= bound else 'EXCEEDED'}")  # fmt: skip


if __name__ == "__main__":
    main()
