"""`linear_kl` beside two plain products (the floor), two `linear_logprob`, and log_softmax of both heads.

    python -m benchmarks.kernels.linear_kl [--tokens T] [--hidden H] [--vocabularies V ...] [--repeats N]

The reference gets no gradient: forward+backward is four products.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
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
from gearshift.kernels import linear_kl, linear_logprob

OURS, TWICE, PLAIN = "gearshift", "2 linear_logprob", "log_softmax of both"


def main() -> None:
    options = parse(__doc__ or "", on_cpu=5)
    report = Report("linear_kl", options)
    for vocabulary in options.vocabularies:
        forget_compiled()
        shape = shape_of(options, vocabulary)
        policy, reference = pair_of_heads(options, vocabulary)
        targets = targets_of(options, vocabulary)
        results = {}
        for of, one_pass, floor in (
            ("forward", forward, products(*policy, 2)),
            ("forward+backward", forward_backward, products_backward(*policy, 2)),
        ):
            variants = [floor, *variants_of(policy, reference, targets, one_pass)]
            results[of] = measure(variants, options.repeats, options.device, options.compile_limit)
            report.add(shape, of, results[of], base=floor.name, same_as=OURS)
        if vocabulary == max(options.vocabularies):
            state_figures(report, options, shape, results)
    report.finish(axis="V")


def pair_of_heads(options: argparse.Namespace, vocabulary: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The policy's hidden states and weight, and a reference's that are near them, as in PPO."""
    policy = head(options, vocabulary)
    noise = head(options, vocabulary, seed=2)
    return policy, (policy[0] + 0.1 * noise[0], policy[1] + 0.1 * noise[1])


def variants_of(
    policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], targets: Tensor,
    one_pass: Callable[[Function, Tensor, Tensor], Callable[[], Any]],
) -> Iterator[Variant]:  # fmt: skip
    def ours(hidden: Tensor, weight: Tensor) -> Any:
        return linear_kl(hidden, weight, *reference, targets)

    def twice(hidden: Tensor, weight: Tensor) -> Any:
        with torch.no_grad():
            linear_logprob(*reference, targets)
        return linear_logprob(hidden, weight, targets)

    def plain(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        logp = (hidden @ weight.T).float().log_softmax(dim=1)
        with torch.no_grad():
            logq = (reference[0] @ reference[1].T).float().log_softmax(dim=1)
        kl = (logp.exp() * (logp - logq)).sum(dim=1)
        return kl, *(side.gather(1, targets[:, None])[:, 0] for side in (logp, logq))

    # Both logits and log-softmaxes, p, the difference, and the gradients of the policy's, in fp32.
    needs = 8 * 4 * targets.numel() * policy[1].shape[0]
    yield Variant(OURS, one_pass(ours, *policy))
    yield Variant(TWICE, one_pass(twice, *policy), comparable=False)
    yield Variant(PLAIN, one_pass(plain, *policy), needs=needs)
    yield Variant(f"torch.compile of {PLAIN}", one_pass(compiled(plain), *policy), needs=needs, compiled=True)


def state_figures(
    report: Report, options: argparse.Namespace, shape: dict[str, Any], results: dict[str, Results]
) -> None:
    one = results["forward"]
    report.at_most("forward / 2 linear_logprob", one.ratio(OURS, TWICE), 1.1, shape, "x")
    if options.device.type == "cuda":
        report.at_most("forward / 2 products", one.ratio(OURS, "2 products"), 1.3, shape, "x")


if __name__ == "__main__":
    main()
