"""What the benchmarks of the two clipped losses share: the passes, the variants and the run over lengths."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.batches import Batch, shape_of, stated_length
from benchmarks.kernels.measuring import Results, Variant, compiled, forget_compiled, measure
from benchmarks.kernels.report import Report
from gearshift.kernels import Loss

# First input (which gets the gradient), the two others, mask -> loss, and perhaps metrics
Function = Callable[[Tensor, Tensor, Tensor, Tensor], Any]

OURS, PLAIN = "gearshift", "plain"
COUNTED = "plain + metrics"


def run(operation: str, options: argparse.Namespace, ours: Function, plain: Function, counted: Function) -> None:
    """`ours` and `counted` give the loss and its metrics, `plain` the loss alone."""
    report = Report(operation, options)
    for length in sorted(options.lengths):
        forget_compiled()
        shape = shape_of(options, length)
        inputs = make(options, length)
        results = {}
        for of, one_pass in (("forward", forward), ("forward+backward", forward_backward)):
            ways = [(PLAIN, plain, False), (COUNTED, counted, False), (OURS, ours, False)]
            ways += [(f"torch.compile of {name}", compiled(way), True) for name, way, _ in ways[:2]]
            variants = [Variant(name, one_pass(way, inputs), compiled=slow) for name, way, slow in ways]
            results[of] = measure(variants, options.repeats, options.device, options.compile_limit)
            report.add(shape, of, results[of], base=PLAIN, same_as=PLAIN)
        if length == stated_length(options.lengths) and options.device.type == "cuda":
            state_figures(report, shape, results["forward"])
    report.finish(axis="L")


def make(options: argparse.Namespace, length: int) -> list[Tensor]:
    """The first two near each other, as before and after a few steps of the optimizer."""
    batch = Batch(options, length)
    old = batch.noise()
    return [old + batch.noise(0.1), old, batch.noise(), batch.mask]


def forward(function: Function, inputs: list[Tensor]) -> Callable[[], Any]:
    @torch.no_grad()
    def once() -> Any:
        return flat(function(*inputs))

    return once


def forward_backward(function: Function, inputs: list[Tensor]) -> Callable[[], Any]:
    leaf = inputs[0].detach().requires_grad_()

    def once() -> Any:
        loss, metrics = flat(function(leaf, *inputs[1:]))
        return loss, metrics, *torch.autograd.grad(loss, leaf)

    return once


def flat(found: Tensor | Loss) -> tuple[Tensor, dict[str, Tensor]]:
    return (found, {}) if isinstance(found, Tensor) else (found.loss, found.metrics)


def state_figures(report: Report, shape: dict[str, Any], results: Results) -> None:
    """Stated for GPUs only."""
    seconds = results.measured[OURS].median if OURS in results.measured else None
    report.at_most("forward", None if seconds is None else seconds * 1e6, 10, shape, " µs")
