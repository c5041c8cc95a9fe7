"""Rollouts against generation under ZeRO-3, on the same model and prompts, in one run.

    deepspeed --num_accelerators 2 benchmarks/rollout.py            (on GPUs: --num_gpus N)

Three ways, in turn, `--repeats` times; medians, and the ratio pair by pair:
  zero3      `transformers` generate on the DeepSpeed ZeRO-3 engine, every rank its own prompts (weights gathered layer
             by layer for every token)
  gathered   all weights gathered once into a plain copy on every rank, then `transformers` generate with it: the way
             of DeepSpeed-Chat and TRL, without the cost of their hooks
  gearshift  `HybridEngine.rollout()`: the shift, then tensor-parallel generation; the shift is in the time

All sample at temperature 1 without an EOS, so that every way makes the same number of tokens.
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
from transformers import AutoModelForCausalLM

from benchmarks.kernels.command import DTYPES
from benchmarks.llama import add_sizes, config_of, in_turn
from gearshift.engine import HybridEngine, Prompts, Sampling, Training, World, init_distributed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, hidden=384, layers=6, heads=6, vocabulary=8192)
    parser.add_argument("--prompts", type=int, default=16, help="over all ranks")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    world = init_distributed()
    policy = build(options, world)
    prompts = make_prompts(options, world)
    copy = AutoModelForCausalLM.from_config(policy.config, dtype=policy.dtype).to(world.device).eval()
    ways: dict[str, Callable[[], None]] = {
        "zero3": lambda: zero3(policy, prompts, options.new_tokens),
        "gathered": lambda: gathered(policy, copy, prompts, options.new_tokens),
        "gearshift": lambda: gearshift(policy, prompts, options),
    }
    seconds = in_turn(ways, options.repeats, world)
    if world.is_main:
        report(options, world, policy, seconds)


def build(options: argparse.Namespace, world: World) -> HybridEngine:
    return HybridEngine.load(
        "config",
        world,
        dtype=DTYPES[options.dtype],
        micro_batch_size=options.prompts,
        training=Training(learning_rate=1e-5),
        config=config_of(options),
        tp_size=world.size,
    )


def make_prompts(options: argparse.Namespace, world: World) -> Prompts:
    """This rank's share of the same random prompts."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, options.vocabulary, (options.prompts, options.prompt_tokens), generator=generator)
    row = torch.arange(options.prompts)
    whole = Prompts(tokens, torch.full_like(row, options.prompt_tokens), row, row, torch.zeros_like(row))
    return whole.select(world.share(options.prompts)).to(world.device)


@torch.no_grad()
def transformers_generate(module: Any, prompts: Prompts, new_tokens: int) -> None:
    out = module.generate(
        prompts.tokens, do_sample=True, top_k=0, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0
    )
    assert out.shape[1] == prompts.tokens.shape[1] + new_tokens


def zero3(policy: HybridEngine, prompts: Prompts, new_tokens: int) -> None:
    module = policy.engine.module.eval()
    transformers_generate(module, prompts, new_tokens)
    module.train()


@torch.no_grad()
def gathered(policy: HybridEngine, copy: Any, prompts: Prompts, new_tokens: int) -> None:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(policy.module.parameters())):
        copy.load_state_dict(policy.module.state_dict())
    transformers_generate(copy, prompts, new_tokens)


def gearshift(policy: HybridEngine, prompts: Prompts, options: argparse.Namespace) -> None:
    policy.steps += 1  # as after an optimizer step: the weights are shifted anew
    with policy.rollout() as generator:
        rollouts = generator.generate(prompts, Sampling(options.new_tokens, eos_ids=(), seed=policy.steps))
    assert int(rollouts.mask.sum()) == len(prompts) * options.new_tokens


def report(options: argparse.Namespace, world: World, policy: HybridEngine, seconds: dict[str, list[float]]) -> None:
    tokens = options.prompts * options.new_tokens
    result: dict[str, Any] = {
        "device": platform.processor() or platform.machine()
        if world.device.type == "cpu"
        else torch.cuda.get_device_name(),
        "ranks": world.size,
        "parameters": policy.parameters_total,
        "options": {k: str(v) for k, v in vars(options).items() if k != "local_rank"},
        "tokens_per_second": {n: tokens / statistics.median(s) for n, s in seconds.items()},
        "shift_seconds": policy.shift_seconds,
        "gearshift_over": {
            name: statistics.median(other / own for other, own in zip(seconds[name], seconds["gearshift"], strict=True))
            for name in seconds
            if name != "gearshift"
        },
    }
    print(f"{policy.parameters_total / 1e6:.1f} M parameters, {world.size} ranks, {options.prompts} prompts of "
          f"{options.prompt_tokens} tokens, {options.new_tokens} new, {options.dtype}")  # fmt: skip
    for name, value in result["tokens_per_second"].items():
        print(f"{name:<10} {value:10,.0f} tokens/s   (min {min(seconds[name]):.3f} s, max {max(seconds[name]):.3f} s)")
    for name, value in result["gearshift_over"].items():
        print(f"gearshift / {name:<9} {value:6.1f}x   median of {options.repeats} pairs")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
