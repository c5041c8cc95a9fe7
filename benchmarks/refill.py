"""Slots that are refilled as answers end, against the same generator waiting for the longest answer of each batch.

    deepspeed --num_accelerators 2 benchmarks/refill.py            (on GPUs: --num_gpus N)

All answer the same random prompts at temperature 1 with the same number of slots, without an EOS: the length of every
answer is drawn beforehand, uniformly from `--shortest` to `--longest`, and given to `generate` as its limit.
  waiting   one call for each batch of as many prompts as there are slots, all of whose rows are decoded until the
            longest answer ends (as `transformers` generate does); what a row has too many does not count
  dropped   one call for each batch, rows that have ended are no longer decoded; the next batch starts when the
            longest answer ends
  refilled  one call for all prompts: a slot takes the next prompt when its answer ends
In turn, `--repeats` times after one warm-up; medians, and the ratios pair by pair. Weights are in place: no shift is
timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The repository in place of this folder, whose `kernels` would hide Hugging Face's package of that name.
if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks.kernels.command import DTYPES
from benchmarks.llama import add_sizes, config_of, in_turn
from gearshift.engine import HybridEngine, Prompts, Sampling, World, init_distributed
from gearshift.engine.generator import Generator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, hidden=384, layers=6, heads=6, vocabulary=8192)
    parser.add_argument("--prompts", type=int, default=128, help="over all ranks")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--shortest", type=int, default=8, help="answer, tokens")
    parser.add_argument("--longest", type=int, default=128, help="answer, tokens")
    parser.add_argument("--slots", type=int, default=16, help="sequences decoded at once; all ranks are one replica")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    world = init_distributed()
    policy = build(options, world)
    prompts, limits = make_prompts(options)
    with policy.rollout() as generator:
        ways: dict[str, Callable[[], None]] = {
            "waiting": lambda: in_batches(generator, world, options, prompts, limits, until_longest=True),
            "dropped": lambda: in_batches(generator, world, options, prompts, limits, until_longest=False),
            "refilled": lambda: generate(generator, world, options, prompts, limits),
        }
        seconds = in_turn(ways, options.repeats, world)
    if world.is_main:
        report(options, world, policy, int(limits.sum()), seconds)


def build(options: argparse.Namespace, world: World) -> HybridEngine:
    return HybridEngine.load(
        "config",
        world,
        dtype=DTYPES[options.dtype],
        micro_batch_size=1,
        config=config_of(options),
        tp_size=world.size,
        slots=options.slots,
    )


def make_prompts(options: argparse.Namespace) -> tuple[Prompts, Tensor]:
    """All prompts, and the length of the answer to each."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, options.vocabulary, (options.prompts, options.prompt_tokens), generator=generator)
    limits = torch.randint(options.shortest, options.longest + 1, (options.prompts,), generator=generator)
    row = torch.arange(options.prompts)
    return Prompts(tokens, torch.full_like(row, options.prompt_tokens), row, row, torch.zeros_like(row)), limits


def generate(generator: Generator, world: World, options: argparse.Namespace, prompts: Prompts, limits: Tensor) -> None:
    """This rank brings its share of the rows, and checks that they came out as long as they should."""
    mine = world.share(len(prompts))
    rollouts = generator.generate(prompts.select(mine), Sampling(options.longest, eos_ids=()), limits[mine])
    assert rollouts.mask.sum(1).tolist() == limits[mine].tolist()


def in_batches(
    generator: Generator,
    world: World,
    options: argparse.Namespace,
    prompts: Prompts,
    limits: Tensor,
    until_longest: bool,
) -> None:
    for batch in torch.arange(len(prompts)).split(options.slots):
        own = limits[batch]
        generate(generator, world, options, prompts.select(batch), own.max().expand_as(own) if until_longest else own)


def report(
    options: argparse.Namespace, world: World, policy: HybridEngine, tokens: int, seconds: dict[str, list[float]]
) -> None:
    ratios = {
        name: [other / own for other, own in zip(seconds[name], seconds["refilled"], strict=True)]
        for name in ("waiting", "dropped")
    }
    cpu = world.device.type == "cpu"
    result: dict[str, Any] = {
        "device": platform.processor() or platform.machine() if cpu else torch.cuda.get_device_name(),
        "ranks": world.size,
        "parameters": policy.parameters_total,
        "options": {k: str(v) for k, v in vars(options).items() if k != "local_rank"},
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": {name: tokens / statistics.median(taken) for name, taken in seconds.items()},
        "refilled_over": {name: statistics.median(each) for name, each in ratios.items()},
    }
    print(json.dumps(result))
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in result["tokens_per_second"].items())
    told = "; ".join(
        f"{statistics.median(each):.2f} times as fast as {name} ({min(each):.2f} to {max(each):.2f})"
        for name, each in ratios.items()
    )
    print(
        f"refilled slots: {told}; medians of {options.repeats} pairs; tokens/s: {rates}; answers of "
        f"{options.shortest} to {options.longest} tokens, {options.slots} slots, {world.size} ranks"
    )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
