"""`linear_logprob` beside plain products (the floor) and other ways to the log-probs of given tokens.

    python -m benchmarks.kernels.linear_logprob [--tokens T] [--hidden H] [--vocabularies V ...] [--repeats N]

Backward is that of the log-probs' sum ("+ entropy": and of the entropies'). Ways that form their gradients in the
forward can do only that (marked "sum"); the others give a log-prob per token, each with its own slope, which is what
PPO needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.command import parse
from benchmarks.kernels.heads import (
    Function,
    forward,
    forward_backward,
    head,
    products,
    products_backward,
    shape_of,
    targets_of,
)
from benchmarks.kernels.measuring import Results, Variant, compiled, forget_compiled, measure
from benchmarks.kernels.report import Report
from gearshift.kernels import linear_logprob

OURS = "gearshift"
PLAIN = "log_softmax + gather"


def main() -> None:
    options = parse(__doc__ or "", on_cpu=5)
    report = Report("linear_logprob", options)
    for vocabulary in options.vocabularies:
        forget_compiled()
        shape = shape_of(options, vocabulary)
        hidden, weight = head(options, vocabulary)
        targets = targets_of(options, vocabulary)
        results = {}
        for of, one_pass, floor in (
            ("forward", forward, products(hidden, weight, 1)),
            ("forward+backward", forward_backward, products_backward(hidden, weight, 1)),
        ):
            variants = [floor, *variants_of(options, hidden, weight, targets, one_pass)]
            results[of] = measure(variants, options.repeats, options.device, options.compile_limit)
            report.add(shape, of, results[of], base=floor.name, same_as=OURS)
        if vocabulary == max(options.vocabularies):
            state_figures(report, options, shape, results)
    report.finish(axis="V")


def variants_of(
    options: argparse.Namespace, hidden: Tensor, weight: Tensor, targets: Tensor,
    one_pass: Callable[[Function, Tensor, Tensor], Callable[[], Any]],
) -> Iterator[Variant]:  # fmt: skip
    logits = 4 * targets.numel() * weight.shape[0]
    for entropy in (False, True):
        run = one_pass(ours(targets, entropy), hidden, weight)
        yield Variant(OURS + (" + entropy" if entropy else ""), run, comparable=not entropy)
    for name, function in peers(options.device, targets):
        run = one_pass(function, hidden, weight)
        # The logits, their log-softmax and both gradients, in fp32.
        needs = 0 if name in CHUNKED else 4 * logits
        yield Variant(name, run, needs=needs, compiled=name.startswith("torch.compile"))


# --- ours ------------------------------------------------------------------------------------------------------------


def ours(targets: Tensor, entropy: bool) -> Function:
    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        logprobs, entropies = linear_logprob(hidden, weight, targets, entropy=entropy)
        return logprobs if entropies is None else logprobs + entropies  # so that backward is of both

    return run


# --- peers: functions of hidden and weight that return log-probs, or losses ------------------------------------------

# A loss stays as it is: turned into a log-prob, its gradient would be -1 and no longer 1, which costs those that form
# gradients in the forward one more pass over them.

TORCH_SUM, TORCH_TOKENS = "F.linear_cross_entropy, sum", "F.linear_cross_entropy"
LIGER, FLASH = "Liger fused linear CE, sum", "flash-attn CE on logits"
CHUNKED = (TORCH_SUM, TORCH_TOKENS, LIGER)


def peers(device: torch.device, targets: Tensor) -> Iterator[tuple[str, Function]]:
    def log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
        return (hidden @ weight.T).float().log_softmax(dim=1).gather(1, targets[:, None])[:, 0]

    def cross_entropy(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")

    yield PLAIN, log_softmax
    yield "F.cross_entropy", cross_entropy
    yield "torch.compile of " + PLAIN, compiled(log_softmax)
    yield from of_torch(targets)
    if device.type == "cuda":
        yield from of_liger(targets)
        yield from of_flash_attention(targets)


def of_torch(targets: Tensor) -> Iterator[tuple[str, Function]]:
    """torch 2.13 and later: by chunks of tokens, as its own options choose them."""
    if not hasattr(F, "linear_cross_entropy"):
        return

    def fused(reduction: str) -> Function:
        chunked = torch.nn.LinearCrossEntropyOptions()

        def run(hidden: Tensor, weight: Tensor) -> Tensor:
            return F.linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=chunked)

        return run

    yield TORCH_TOKENS, fused("none")
    yield TORCH_SUM, fused("sum")


def of_liger(targets: Tensor) -> Iterator[tuple[str, Function]]:
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    yield LIGER, lambda hidden, weight: loss(weight, hidden, targets)


def of_flash_attention(targets: Tensor) -> Iterator[tuple[str, Function]]:
    try:
        from flash_attn.losses.cross_entropy import CrossEntropyLoss
    except ImportError:
        return
    loss = CrossEntropyLoss(reduction="none", inplace_backward=True)
    yield FLASH, lambda hidden, weight: loss(hidden @ weight.T, targets)


# --- stated figures --------------------------------------------------------------------------------------------------


def state_figures(
    report: Report, options: argparse.Namespace, shape: dict[str, Any], results: dict[str, Results]
) -> None:
    on_cpu = options.device.type == "cpu"
    one, both = results["forward"], results["forward+backward"]
    report.at_most("forward / product", one.ratio(OURS, "1 product"), 1.0 if on_cpu else 1.2, shape, "x")
    bound = 1.35 if on_cpu else 1.6
    report.at_most("forward+backward / 3 products", both.ratio(OURS, "3 products"), bound, shape, "x")
    report.at_most(f"peak memory / {PLAIN}", peak_ratio(both, OURS, PLAIN), 0.5, shape, "x")


def peak_ratio(results: Results, name: str, base: str) -> float | None:
    peaks = [results.measured[n].peak if n in results.measured else None for n in (name, base)]
    return peaks[0] / peaks[1] if peaks[0] is not None and peaks[1] else None


if __name__ == "__main__":
    main()
