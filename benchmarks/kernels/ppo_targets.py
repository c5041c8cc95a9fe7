"""`ppo_targets` beside the loop over time steps that other libraries have, vectorised over the batch.

python -m benchmarks.kernels.ppo_targets [--sequences B] [--lengths L ...] [--repeats N]
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.batches import Batch, shape_of, stated_length
from benchmarks.kernels.command import parse
from benchmarks.kernels.measuring import Results, Variant, compiled, forget_compiled, measure
from benchmarks.kernels.report import Report
from gearshift.kernels import Targets, ppo_targets

OURS, LOOP, COMPILED = "gearshift", "loop over time", "torch.compile of the loop"
KL_COEF, GAMMA, LAM, EPSILON = 0.05, 1.0, 0.95, 1e-8
AGREE = 1e-6  # of max(1, the largest entry)


def main() -> None:
    options = parse(__doc__ or "")
    report = Report("ppo_targets", options)
    for length in sorted(options.lengths):
        forget_compiled()
        inputs = make(options, length)
        variants = [
            Variant(LOOP, partial(loop, **inputs)),
            Variant(OURS, partial(ours, **inputs)),
        ]
        gave_up = any(COMPILED in section["left_out"] for section in report.sections)
        if not gave_up:  # a longer loop takes longer to compile
            variants.append(Variant(COMPILED, partial(compiled(loop), **inputs), compiled=True))
        results = measure(variants, options.repeats, options.device, options.compile_limit)
        if gave_up:
            results.left_out[COMPILED] = "a shorter one was given up already"
        shape = shape_of(options, length)
        report.add(shape, "forward", results, base=LOOP, same_as=OURS)
        apart = differences(ours(**inputs), loop(**inputs))
        print("  largest difference to the loop: " + ", ".join(f"{k} {v:.1e}" for k, v in apart.items()) + "\n")
        if length == stated_length(options.lengths):
            state_figures(report, options, shape, results, max(apart.values()))
    report.finish(axis="L")


def make(options: argparse.Namespace, length: int) -> dict[str, Tensor]:
    batch = Batch(options, length)
    logprobs = batch.noise() - 2
    return {
        "logprobs": logprobs,
        "ref_logprobs": logprobs + batch.noise(0.1),
        "values": batch.noise(),
        "mask": batch.mask,
        "scores": batch.scores(),
    }


@torch.no_grad()
def ours(logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, scores: Tensor) -> Targets:
    return ppo_targets(logprobs, ref_logprobs, values, mask, scores, kl_coef=KL_COEF, gamma=GAMMA, lam=LAM)


@torch.no_grad()
def loop(logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, scores: Tensor) -> Targets:
    """One step of all sequences after the other, from the end."""
    kl = (logprobs - ref_logprobs).masked_fill(~mask, 0.0)
    values = values.masked_fill(~mask, 0.0)
    last = mask.sum(dim=1, keepdim=True) - 1
    rewards = (-KL_COEF * kl).scatter_add(1, last, scores[:, None])
    length = mask.shape[1]
    advantage = torch.zeros_like(scores)
    reversed_advantages = []
    for t in reversed(range(length)):
        next_values = values[:, t + 1] if t + 1 < length else 0.0
        delta = rewards[:, t] + GAMMA * next_values - values[:, t]
        advantage = delta + GAMMA * LAM * advantage
        reversed_advantages.append(advantage)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    returns = (advantages + values).masked_fill(~mask, 0.0)
    count = mask.sum()
    mean = advantages.masked_fill(~mask, 0.0).sum() / count
    variance = (advantages - mean).square().masked_fill(~mask, 0.0).sum() / count
    whitened = (advantages - mean) * torch.rsqrt(variance + EPSILON)
    return Targets(rewards, kl, whitened.masked_fill(~mask, 0.0), returns)


def differences(got: Targets, want: Targets) -> dict[str, float]:
    """Of each field, in units of max(1, the largest entry)."""
    return {
        name: float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))
        for name, mine, theirs in zip(Targets._fields, got, want, strict=True)
    }


def state_figures(
    report: Report, options: argparse.Namespace, shape: dict[str, Any], results: Results, apart: float
) -> None:
    report.at_least("the loop's time / gearshift's", results.ratio(LOOP, OURS), 10, shape, "x")
    report.at_most("largest difference to the loop", apart, AGREE, shape, "")
    if options.device.type == "cuda":
        seconds = results.measured[OURS].median if OURS in results.measured else None
        report.at_most("time", None if seconds is None else seconds * 1e6, 15, shape, " µs")


if __name__ == "__main__":
    main()
