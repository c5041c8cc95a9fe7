"""What a step of decoding does between its products, for few numbers on a processor: tasks of the compiled library.

Letters: n rows, h heads, D size of a head, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu as torch_silu

from gearshift.kernels import native
from gearshift.kernels.few_rows_linear import FEW
from gearshift.kernels.native import tasks
from gearshift.kernels.native.tasks import Task
from gearshift.kernels.rms_norm import rms_norm

MOST = 1 << 17  # numbers that a step has in front of a norm: more come from a prefill
# Numbers of a unit of the compiled functions, as they have it, and the fewest that a thread takes at a time.
UNIT, GRAIN = 256, 4096

_Norm = tasks.structure("Norm", "features i, x p, weight p, eps d, offset d, y p")
_Rotation = tasks.structure(
    "Rotation",
    "heads i, size i, x_row i, x_head i, cos_row i, sin_row i, y_row i, y_head i, x p, cos p, sin p, y p",
)
_Pointwise = tasks.structure("Pointwise", "numbers i, a p, b p, y p")


def norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, rounds: bool = False) -> Tensor:
    """`rms_norm`, to the same bits."""
    if not serves(x, weight) or x.numel() > MOST or not weight.is_contiguous():
        return rms_norm(x, weight, eps, offset, rounds)
    x = x.contiguous()
    out = torch.empty_like(x)
    features = x.shape[-1]
    arguments = _Norm(features, native.pointer(x), native.pointer(weight), eps, offset, native.pointer(out))
    tasks.do(Task("step_norm", arguments, x.numel() // max(1, features), -(-GRAIN // max(1, features))))
    return out


def silu(x: Tensor) -> Tensor:
    """x / (1 + e^−x), to 4e-7 of the result (0 below −87); without gradients. A row's bits do not depend on the rows
    beside it."""
    if not serves(x) or x.numel() > FEW * x.shape[-1]:
        return torch_silu(x)
    x = x.contiguous()
    out = torch.empty_like(x)
    tasks.do(_pointwise("silu", x, None, out))
    return out


def sum_of(a: Tensor, b: Tensor, out: Tensor) -> Task:
    """`out` = a + b of contiguous fp32 tensors of one shape; out may be one of them."""
    return _pointwise("sum", a, b, out)


def product_of(a: Tensor, b: Tensor, out: Tensor) -> Task:
    """`out` = a · b, as in `sum_of`."""
    return _pointwise("product", a, b, out)


def rotation(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Task:
    """`out` = x · cos + (−second half, first half of x) · sin, to the bits of operations on whole tensors: x and out
    `[n, h, D]` fp32, cos and sin `[n, D]`, whose D values lie side by side."""
    assert all(tensor.stride(-1) == 1 for tensor in (x, cos, sin, out))
    strides = (*x.stride()[:2], cos.stride(0), sin.stride(0), *out.stride()[:2])
    rows, heads, size = x.shape
    arguments = _Rotation(heads, size, *strides, *map(native.pointer, (x, cos, sin, out)))
    return Task("step_rotation", arguments, rows, -(-GRAIN // max(1, heads * size)))


def serves(*tensors: Tensor) -> bool:
    return native.built() is not None and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)


def _pointwise(name: str, a: Tensor, b: Tensor | None, out: Tensor) -> Task:
    assert all(tensor.is_contiguous() for tensor in (a, b, out) if tensor is not None)
    arguments = _Pointwise(out.numel(), *map(native.pointer, (a, b, out)))
    return Task(f"step_{name}", arguments, -(-out.numel() // UNIT), GRAIN // UNIT)
