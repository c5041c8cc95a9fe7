"""A linear layer for the few rows of a step of decoding. Letters: n rows, I features in, O features out."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from gearshift.kernels import native

# More rows than this and a product that packs its operands is faster (measured with AVX-512, 192 to 512 features).
FEW = 32
# Outputs that a thread takes at a time, and the fewest weights for which a second thread is worth waking.
BLOCK, WORTH_THREADS = 128, 1 << 20


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b` without gradients: x `[..., I]`, weight `[O, I]`, bias `[O]` or None -> `[..., O]`.

    On processors with few rows W is read as it lies, and a row's result has the same bits whatever rows are beside it.
    """
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or not 0 < rows <= FEW:
        return linear(x, weight, bias)
    if x.dtype != torch.float32 or not _serves(weight, bias):
        return _turned(x, weight, bias) if rows > 1 else linear(x, weight, bias)
    out = torch.empty(*x.shape[:-1], weight.shape[0])
    x = x.contiguous()
    outputs, features = weight.shape
    pointers = map(native.pointer, (x, weight, bias, out))
    if native.run("few_rows_linear", functools.partial(_product, rows, features, outputs, *pointers)):
        raise MemoryError(f"few_rows_linear: no memory for {rows} rows of {features} features")
    return out


def _product(rows: int, features: int, outputs: int, x: Any, weight: Any, bias: Any, out: Any) -> int:
    """Of what lies at these addresses; of large layers each of torch's threads takes some of the outputs."""
    product = native.function("few_rows_linear", "iiiipppp")

    def some(first: int, last: int) -> int:
        low, high = first * BLOCK, min(last * BLOCK, outputs)
        own_bias = None if bias is None else bias + 4 * low
        failed: int = product(
            rows, features, high - low, outputs, x, weight + 4 * low * features, own_bias, out + 4 * low
        )
        return failed

    blocks = -(-outputs // BLOCK)
    return max(native.over_rows(some, blocks) if outputs * features >= WORTH_THREADS else [some(0, blocks)])


def _turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product the other way round, which the libraries for processors do faster than `linear` at few rows."""
    # Contiguous again, or attention and its products leave their fast paths.
    y = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t().contiguous()
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], -1)


def _serves(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the compiled function may be used: wide registers, and what it expects to find in memory."""
    return (
        has_wide_registers()
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and (bias is None or (bias.dtype == torch.float32 and bias.is_contiguous()))
    )


@functools.cache
def has_wide_registers() -> bool:
    """Whether the compiled function is there and this processor is one that it was made for."""
    return native.built() is not None and bool(native.function("has_wide_registers", "")())
