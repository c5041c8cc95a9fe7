"""Rollouts against other ways to generate, on the same model and prompts, in one run.

    deepspeed --num_accelerators 2 benchmarks/rollout.py            (on GPUs: --num_gpus N)

In turn, `--repeats` times; medians, and the ratio pair by pair:
  zero3      `transformers` generate on the DeepSpeed ZeRO-3 engine, every rank its own prompts (weights gathered layer
             by layer for every token)
  gathered   all weights gathered once into a plain copy on every rank, then `transformers` generate with it: the way
             of DeepSpeed-Chat and TRL, without the cost of their hooks
  whole      the same, the gathering left out: a whole copy on every rank, each its own prompts
  gearshift  `HybridEngine.rollout()`: the shift, then tensor-parallel generation; the shift is in the time
  floor      the bare `F.linear` products of gearshift's slices, as many as the rollout has steps: no attention, no
             sampling, nothing between ranks

All sample at temperature 1 without an EOS, so that every way makes the same number of tokens.
"""

from __future__ import annotations

import argparse
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
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from benchmarks.kernels.command import DTYPES, device_name
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
        "whole": lambda: transformers_generate(copy, prompts, options.new_tokens),
        "gearshift": lambda: gearshift(policy, prompts, options),
        "floor": lambda: floor(policy, options),
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


@torch.no_grad()
def floor(policy: HybridEngine, options: argparse.Namespace) -> None:
    """One step over all prompt tokens, its last position alone through the head; then a step for each further token."""
    slices = {name: tensor for name, tensor in policy._replica.slices.items() if tensor.dim() == 2}
    head = slices.pop("lm_head.weight")
    layers = [tensor for name, tensor in slices.items() if "embed" not in name]
    widths = {tensor.shape[1] for tensor in (head, *layers)}
    inputs = {
        rows: {width: torch.zeros(rows, width, dtype=policy.dtype, device=head.device) for width in widths}
        for rows in (options.prompts, options.prompts * options.prompt_tokens)
    }

    def step(rows: int) -> Tensor:
        for weight in layers:
            linear(inputs[rows][weight.shape[1]], weight)
        return linear(inputs[options.prompts][head.shape[1]], head)

    step(options.prompts * options.prompt_tokens)
    for _ in range(options.new_tokens - 1):
        step(options.prompts)


def gearshift(policy: HybridEngine, prompts: Prompts, options: argparse.Namespace) -> None:
    policy.steps += 1  # as after an optimizer step: the weights are shifted anew
    with policy.rollout() as generator:
        rollouts = generator.generate(prompts, Sampling(options.new_tokens, eos_ids=(), seed=policy.steps))
    assert int(rollouts.mask.sum()) == len(prompts) * options.new_tokens


def report(options: argparse.Namespace, world: World, policy: HybridEngine, seconds: dict[str, list[float]]) -> None:
    tokens = options.prompts * options.new_tokens
    result: dict[str, Any] = {
        "device": device_name(world.device),
        "ranks": world.size,
        "parameters": policy.parameters_total,
        "options": {k: str(v) for k, v in vars(options).items() if k not in ("local_rank", "out")},
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
        print(f"gearshift / {name:<9} {value:6.2f}x   median of {options.repeats} pairs")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        draw(result, options.out.with_suffix(".png"))


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates: dict[str, float] = result["tokens_per_second"]
    figure, axes = pyplot.subplots(figsize=(8, 3.6))
    colours = {"gearshift": "#d62728", "floor": "#bbbbbb"}
    bars = axes.bar(list(rates), list(rates.values()), color=[colours.get(n, "#1f77b4") for n in rates], width=0.6)
    over = result["gearshift_over"]
    axes.bar_label(bars, [f"{r:,.0f}" + (f"\ngearshift {over[n]:.2f}x" if n in over else "") for n, r in rates.items()])
    axes.set_ylabel("tokens/s")
    axes.set_ylim(0, max(rates.values()) * 1.2)
    axes.grid(True, axis="y", alpha=0.3)
    options = result["options"]
    axes.set_title(
        f"{result['parameters'] / 1e6:.0f} M parameters in {options['dtype']}, {result['ranks']} ranks, "
        f"{options['prompts']} prompts of {options['prompt_tokens']} tokens, {options['new_tokens']} new\n"
        f"{result['device']}", fontsize=11,
    )  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
