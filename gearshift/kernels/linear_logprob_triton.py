"""`linear_logprob` on GPUs: one matrix product per chunk of the vocabulary, into fp32, then one kernel that reads each
row of it once.

Backward goes chunk by chunk as well: the logits again, their gradient in the dtype of the inputs, then the products for
dX, accumulated in fp32, and dW, each row of which is one product over all tokens: one rounding, no atomics.
One kernel that multiplies and sums up tiles while they are in registers writes no logits, and was slower: 14.5 ms
against 13.4 forward, 8192 tokens, H 4096, V 128256, bf16 on an H200 (torch's own product alone: 11.9).
Letters: T tokens, H hidden, V vocabulary rows of this rank, C columns of a chunk.
"""

# What Triton compiles is no Python with types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gearshift.kernels.head import Head, chunk_view, spans
from gearshift.kernels.linear_logprob_cpu import Gradients, Slopes
from gearshift.kernels.states import empty_states
from gearshift.kernels.triton_head import finite, head_logits, head_numbers, pointer, slope_of_cap
from gearshift.kernels.triton_launch import TYPES, Form, Launch

# Elements of fp32 logits held at once: 128 MiB. Between 64 and 512 MiB it makes 7% at most on an H200.
CHUNK_ELEMENTS = 32 << 20


@triton.jit
def state_kernel(
    products, bias, local, states, columns, start, stride, scale, softcap, inverse_temperature,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of a chunk's products, read once: the token's four numbers go on from where the last chunk left them."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(local + row) - start
    m = tl.load(states + row * 4)
    s = tl.load(states + row * 4 + 1)
    e = tl.load(states + row * 4 + 2)
    y = tl.load(states + row * 4 + 3)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        product = tl.load(products + row * stride + column, mask=inside, other=0.0)
        offset = 0.0
        if HAS_BIAS:
            offset = tl.load(bias + start + column, mask=inside, other=0.0).to(tl.float32)
        z = head_logits(product, offset, scale, softcap, inverse_temperature, SOFTCAP)
        z = tl.where(inside, z, -float("inf"))
        # Padding past the last column may have the target's number on another rank: it is not its logit.
        hit = (column == target) & inside
        if tl.max(hit.to(tl.int32), 0) > 0:
            y = tl.sum(tl.where(hit, z, 0.0), 0)
        top = tl.maximum(m, tl.max(z, 0))
        # e^(-1e4) is 0: a difference that is lower counts as this one, so that 0 · −inf never arises.
        shift = tl.maximum(tl.where(s > 0.0, m - finite(top), 0.0), -1e4)
        factor = tl.exp(shift)
        d = tl.maximum(z - finite(top), -1e4)
        p = tl.exp(d)
        if ENTROPY:
            e = factor * (e + shift * s) + tl.sum(p * d, 0)
        s = factor * s + tl.sum(p, 0)
        m = top
    tl.store(states + row * 4, m)
    tl.store(states + row * 4 + 1, s)
    tl.store(states + row * 4 + 2, e)
    tl.store(states + row * 4 + 3, y)


@triton.jit
def slope_kernel(
    products, gradients, bias, local, slopes, tokens, columns, start, stride, scale, softcap, temperature,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dloss/dproduct of a block of one row, from the token's slopes `[5, T]` (the fields of `Slopes`, in order)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    product = tl.load(products + row * stride + column, mask=inside, other=0.0)
    offset = 0.0
    if HAS_BIAS:
        offset = tl.load(bias + start + column, mask=inside, other=0.0).to(tl.float32)
    z = head_logits(product, offset, scale, softcap, 1.0 / temperature, SOFTCAP)
    d = tl.maximum(z - tl.load(slopes + row), -1e4)
    weight = tl.load(slopes + 2 * tokens + row)
    if ENTROPY:
        weight += tl.load(slopes + 3 * tokens + row) * (d - tl.load(slopes + 4 * tokens + row))
    dz = tl.exp(d) * weight
    hit = column == tl.load(local + row) - start
    dz = (dz + tl.where(hit, tl.load(slopes + tokens + row), 0.0)) * slope_of_cap(z, softcap, temperature, SOFTCAP)
    tl.store(gradients + row * stride + column, dz.to(gradients.dtype.element_ty), mask=inside)


STATE = Launch(state_kernel, {"BLOCK": 2048}, num_warps=4)
SLOPE = Launch(slope_kernel, {"BLOCK": 1024}, num_warps=4)


def state(x: Tensor, weight: Tensor, bias: Tensor | None, local: Tensor, head: Head, entropy: bool) -> Tensor:
    """The states `[T, 4]` fp32 over this rank's vocabulary; `local [T]`: each target's row in `weight`, if here."""
    tokens = x.shape[0]
    states = empty_states(tokens, 4, x.new_empty(0, dtype=torch.float32))
    products = ChunkProducts(x, weight)
    for span in products:
        STATE(
            (tokens,), products.of(span), pointer(bias, x), local, states, *products.shape(span),
            *head_numbers(head), HAS_BIAS=bias is not None, SOFTCAP=head.softcap is not None, ENTROPY=entropy,
        )  # fmt: skip
    return states


def gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    local: Tensor,
    head: Head,
    slopes: Slopes,
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    """dX `[T, H]` fp32 (this rank's part of the sum), dW and db in their inputs' dtypes."""
    tokens = x.shape[0]
    sums = GradientSums(x, weight, bias, wanted)
    packed = pack_slopes(slopes)
    products = ChunkProducts(x, weight)
    scale, softcap, _ = head_numbers(head)
    for span in products:
        z = products.of(span)
        dz = products.gradients(span)
        columns, start, stride = products.shape(span)
        SLOPE(
            (tokens, triton.cdiv(columns, SLOPE.blocks["BLOCK"])), z, dz, pointer(bias, x), local, packed, tokens,
            columns, start, stride, scale, softcap, head.temperature, HAS_BIAS=bias is not None,
            SOFTCAP=head.softcap is not None, ENTROPY=slopes.of_plogp is not None,
        )  # fmt: skip
        sums.add(span, weight[span], dz)
    return sums.dx, sums.dweight, sums.dbias


class ChunkProducts:
    """hidden · weight, fp32, a chunk of columns at a time; one buffer serves all, and one their gradients."""

    def __init__(self, x: Tensor, weight: Tensor):
        self.x, self.weight = x, weight
        rows = weight.shape[0]
        width = max(256, CHUNK_ELEMENTS // max(1, x.shape[0]) // 256 * 256)
        self.width = max(1, min(rows, width))
        self._products = x.new_empty(x.shape[0] * self.width, dtype=torch.float32)
        self._gradients: Tensor | None = None

    def __iter__(self):
        return spans(self.weight.shape[0], self.width)

    def of(self, span: slice) -> Tensor:
        """`[T, C]`, which the next call overwrites."""
        z = chunk_view(self._products, self.x.shape[0], span)
        multiply_into(z, self.x, self.weight[span].T)
        return z

    def gradients(self, span: slice) -> Tensor:
        """Room `[T, C]` for the gradients of the last products, in the dtype of the inputs: in place for fp32."""
        if self.x.dtype == torch.float32:
            return chunk_view(self._products, self.x.shape[0], span)
        if self._gradients is None:
            self._gradients = torch.empty_like(self._products, dtype=self.x.dtype)
        return chunk_view(self._gradients, self.x.shape[0], span)

    def shape(self, span: slice) -> tuple[int, int, int]:
        """Columns, first row of the weight, stride."""
        return span.stop - span.start, span.start, span.stop - span.start


class GradientSums:
    """dX in fp32, dW and db of one head, as its chunks come; None where not wanted."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool]):
        self._x = x
        self.dx = torch.zeros_like(x, dtype=torch.float32) if wanted[0] else None
        self.dweight = torch.empty_like(weight) if wanted[1] else None
        self.dbias = torch.empty_like(bias) if wanted[2] and bias is not None else None

    def add(self, span: slice, rows: Tensor, dz: Tensor) -> None:
        """`rows [C, H]` of the weight, `dz [T, C]`, both in the dtype of the inputs."""
        if self.dx is not None:
            multiply_add(self.dx, dz, rows)
        if self.dweight is not None:
            torch.mm(dz.T, self._x, out=self.dweight[span])
        if self.dbias is not None:
            self.dbias[span] = dz.sum(dim=0, dtype=torch.float32)


def multiply_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out ← left · right in fp32, of half-precision factors too (whose products are exact in fp32)."""
    if left.dtype == torch.float32:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:  # the interpreter's tensors
        torch.mm(left.float(), right.float(), out=out)


def multiply_add(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out ← out + left · right, out in fp32."""
    if left.dtype == torch.float32:
        out.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(left.float(), right.float())


def pack_slopes(slopes: Slopes) -> Tensor:
    """`[5, T]` fp32, in the order of the fields."""
    none = torch.zeros_like(slopes.top)
    return torch.stack([
        slopes.top, slopes.at_target, slopes.of_p, none if slopes.of_plogp is None else slopes.of_plogp, slopes.centre
    ])  # fmt: skip


# --- what the compile check makes ------------------------------------------------------------------------------------

HEAD_TYPES = {"columns": "i32", "start": "i32", "stride": "i32", "scale": "fp32", "softcap": "fp32"}


def forms() -> list[Form]:
    """Every form of the kernels that a call can choose, but for which of bias and entropy the others have."""
    found = []
    for dtype, bias, softcap, entropy in [
        (torch.bfloat16, False, False, False), (torch.bfloat16, True, True, True), (torch.float16, False, False, True),
        (torch.float32, True, True, True),
    ]:  # fmt: skip
        kind = TYPES[dtype]
        options = {"HAS_BIAS": bias, "SOFTCAP": softcap, "ENTROPY": entropy}
        shared = {"products": "*fp32", "bias": f"*{kind}", "local": "*i64", **HEAD_TYPES}
        state_types = shared | {"states": "*fp32", "inverse_temperature": "fp32"}
        slope_types = shared | {"gradients": f"*{kind}", "slopes": "*fp32", "tokens": "i32", "temperature": "fp32"}
        found.append(Form(f"linear_logprob state {kind} {options}", STATE, state_types, options))
        found.append(Form(f"linear_logprob slope {kind} {options}", SLOPE, slope_types, options))
    return found
