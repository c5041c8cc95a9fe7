"""`few_rows_linear` beside `F.linear` and the product the other way round, over all layers of a small decoder in turn,
so that the weights come from memory as they do in a step of decoding. On processors, one thread.

python -m benchmarks.kernels.few_rows_linear [--rows N ...] [--repeats N]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.command import one_thread, parse
from benchmarks.kernels.measuring import Variant, measure
from benchmarks.kernels.report import Report
from gearshift.kernels import few_rows_linear

OURS, LINEAR, TURNED = "gearshift", "F.linear", "mm(W, x^T)"
LAYERS = 6
SHAPES = [(192, 384)] * 3 + [(384, 192)] + [(512, 384)] * 2 + [(384, 512)]  # outputs, features of one layer
Product = Callable[[Tensor, Tensor], Tensor]


@one_thread()
def main() -> None:
    options = parse(__doc__ or "", on_cpu=50)
    options.device = torch.device("cpu")
    report = Report("few_rows_linear", options)
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=rng) for _ in range(LAYERS) for shape in SHAPES]
    for rows in options.rows:
        inputs = {features: torch.randn(rows, features, generator=rng) for _, features in SHAPES}
        ways: dict[str, Product] = {LINEAR: torch.nn.functional.linear, TURNED: turned, OURS: few_rows_linear}
        variants = [Variant(name, all_layers(way, inputs, weights)) for name, way in ways.items()]
        results = measure(variants, options.repeats, options.device, 0)
        shape = {"n": rows, "MiB": sum(w.numel() for w in weights) * 4 >> 20, "dtype": "float32"}
        report.add(shape, "forward", results, base=LINEAR, same_as=LINEAR)
    report.finish(axis="n")


def turned(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(weight, x.t()).t().contiguous()


def all_layers(way: Product, inputs: dict[int, Tensor], weights: list[Tensor]) -> Callable[[], Any]:
    @torch.no_grad()
    def once() -> Any:
        return [way(inputs[weight.shape[1]], weight) for weight in weights]

    return once


if __name__ == "__main__":
    main()
