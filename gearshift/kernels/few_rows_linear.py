"""A linear layer for the few rows of a step of decoding. Letters: n rows, I features in, O features out."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear

from gearshift.kernels import native
from gearshift.kernels.native import tasks

# More rows than this and a product that packs its operands is faster (measured with AVX-512, 192 to 512 features).
FEW = 32
GRAIN = 1 << 14  # the fewest weights that a thread takes at a time


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
    tasks.do(_task(rows, x, weight, bias, out))
    return out


_Arguments = tasks.structure("FewRowsLinear", "rows i, features i, outputs i, x p, weight p, bias p, y p")


def _task(rows: int, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> tasks.Task:
    outputs, features = weight.shape
    arguments = _Arguments(rows, features, outputs, *map(native.pointer, (x, weight, bias, out)))
    units, grain = -(-outputs // tile()), -(-GRAIN // (tile() * features))
    # Layers that read the same (queries, keys, values) need not wait for each other: what each writes is new.
    return tasks.Task("few_rows_linear", arguments, units, grain, x.data_ptr())


def _turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product the other way round, which the libraries for processors do faster than `linear` at few rows."""
    # Contiguous again, or attention and its products leave their fast paths.
    y = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t().contiguous()
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], -1)


def _serves(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the compiled function is there, and what it expects to find in memory."""
    return (
        tile() > 0
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and (bias is None or (bias.dtype == torch.float32 and bias.is_contiguous()))
    )


@functools.cache
def tile() -> int:
    """Outputs of a tile of the compiled function; 0 where it is not there, or has no registers for one."""
    return native.function("few_rows_tile", "")() if native.built() is not None else 0
