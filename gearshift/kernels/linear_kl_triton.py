"""`linear_kl` on GPUs: two matrix products per chunk of the vocabulary, into fp32, then one kernel that reads each row
of both once. Backward as in `linear_logprob_triton`, with the reference's logits computed again as well.

Letters: T tokens, H and H' hidden, V vocabulary rows of this rank, C columns of a chunk.
"""

# What Triton compiles is no Python with types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gearshift.kernels.linear_kl_cpu import KlSlopes, Side
from gearshift.kernels.linear_logprob_cpu import Gradients
from gearshift.kernels.linear_logprob_triton import ChunkProducts, GradientSums, pack_slopes
from gearshift.kernels.states import empty_states
from gearshift.kernels.triton_head import finite, head_logits, head_numbers, pointer, slope_of_cap
from gearshift.kernels.triton_launch import TYPES, Form, Launch


@triton.jit
def chunk_logits(
    products, bias, row, column, inside, start, stride, scale, softcap, inverse_temperature,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    product = tl.load(products + row * stride + column, mask=inside, other=0.0)
    offset = 0.0
    if HAS_BIAS:
        offset = tl.load(bias + start + column, mask=inside, other=0.0).to(tl.float32)
    return head_logits(product, offset, scale, softcap, inverse_temperature, SOFTCAP)


@triton.jit
def kl_state_kernel(
    products, ref_products, bias, ref_bias, local, states, columns, start, stride, scale, softcap, ref_scale,
    ref_softcap, inverse_temperature, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, REF_BIAS: tl.constexpr,
    REF_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of a chunk of both heads' products, read once: the token's eight numbers go on from the last chunk's."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(local + row) - start
    own = states + row * 8
    m = tl.load(own)
    s = tl.load(own + 1)
    e = tl.load(own + 2)
    target_z = tl.load(own + 3)
    n = tl.load(own + 4)
    r = tl.load(own + 5)
    target_y = tl.load(own + 6)
    gap = tl.load(own + 7)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        z = chunk_logits(
            products, bias, row, column, inside, start, stride, scale, softcap, inverse_temperature, HAS_BIAS, SOFTCAP
        )
        y = chunk_logits(
            ref_products, ref_bias, row, column, inside, start, stride, ref_scale, ref_softcap, inverse_temperature,
            REF_BIAS, REF_SOFTCAP,
        )  # fmt: skip
        z = tl.where(inside, z, -float("inf"))
        y = tl.where(inside, y, -float("inf"))
        hit = (column == target) & inside
        if tl.max(hit.to(tl.int32), 0) > 0:
            target_z = tl.sum(tl.where(hit, z, 0.0), 0)
            target_y = tl.sum(tl.where(hit, y, 0.0), 0)
        top = tl.maximum(m, tl.max(z, 0))
        ref_top = tl.maximum(n, tl.max(y, 0))
        shift = tl.maximum(tl.where(s > 0.0, m - finite(top), 0.0), -1e4)
        ref_shift = tl.where(n > -float("inf"), n - finite(ref_top), 0.0)
        factor = tl.exp(shift)
        d = z - finite(top)
        p = tl.exp(d)
        # p = 0 adds 0; a token with p > 0 that the reference never draws makes the gap infinite, for good.
        terms = tl.sum(tl.where(p > 0.0, p * (d - (y - finite(ref_top))), 0.0), 0)
        moved = factor * (gap + (shift - ref_shift) * s)
        gap = tl.where(gap == float("inf"), gap, moved) + terms
        if ENTROPY:
            e = factor * (e + shift * s) + tl.sum(p * tl.maximum(d, -1e4), 0)
        s = factor * s + tl.sum(p, 0)
        r = tl.exp(tl.maximum(ref_shift, -1e4)) * r + tl.sum(tl.exp(tl.maximum(y - finite(ref_top), -1e4)), 0)
        m = top
        n = ref_top
    tl.store(own, m)
    tl.store(own + 1, s)
    tl.store(own + 2, e)
    tl.store(own + 3, target_z)
    tl.store(own + 4, n)
    tl.store(own + 5, r)
    tl.store(own + 6, target_y)
    tl.store(own + 7, gap)


@triton.jit
def kl_slope_kernel(
    products, ref_products, gradients, bias, ref_bias, local, slopes, tokens, columns, start, stride, scale, softcap,
    ref_scale, ref_softcap, temperature, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, REF_BIAS: tl.constexpr,
    REF_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dloss/dproduct of a block of one row, from the token's slopes `[8, T]`: those of `Slopes`, then of `KlSlopes`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    z = chunk_logits(
        products, bias, row, column, inside, start, stride, scale, softcap, 1.0 / temperature, HAS_BIAS, SOFTCAP
    )
    y = chunk_logits(
        ref_products, ref_bias, row, column, inside, start, stride, ref_scale, ref_softcap, 1.0 / temperature,
        REF_BIAS, REF_SOFTCAP,
    )  # fmt: skip
    d = tl.maximum(z - tl.load(slopes + row), -1e4)
    # Finite, so that a token that neither would draw adds 0·finite; where p > 0 the KL is infinite: no slope.
    ref_d = tl.maximum(y - tl.load(slopes + 5 * tokens + row), -1e30)
    weight = tl.load(slopes + 2 * tokens + row)
    weight += tl.load(slopes + 6 * tokens + row) * (d - ref_d + tl.load(slopes + 7 * tokens + row))
    if ENTROPY:
        weight += tl.load(slopes + 3 * tokens + row) * (d - tl.load(slopes + 4 * tokens + row))
    dz = tl.exp(d) * weight
    hit = column == tl.load(local + row) - start
    dz = (dz + tl.where(hit, tl.load(slopes + tokens + row), 0.0)) * slope_of_cap(z, softcap, temperature, SOFTCAP)
    tl.store(gradients + row * stride + column, dz.to(gradients.dtype.element_ty), mask=inside)


STATE = Launch(kl_state_kernel, {"BLOCK": 2048}, num_warps=8)
SLOPE = Launch(kl_slope_kernel, {"BLOCK": 1024}, num_warps=8)


def state(policy: Side, reference: Side, local: Tensor, entropy: bool) -> Tensor:
    """The states `[T, 8]` fp32 over this rank's vocabulary; `local [T]`: each target's row in the weights, if here."""
    tokens = local.shape[0]
    states = empty_states(tokens, 8, policy.x.new_empty(0, dtype=torch.float32))
    ours, theirs = ChunkProducts(policy.x, policy.weight), ChunkProducts(reference.x, reference.weight)
    for span in ours:
        STATE(
            (tokens,), ours.of(span), theirs.of(span), pointer(policy.bias, policy.x),
            pointer(reference.bias, reference.x), local, states, *ours.shape(span), *_numbers(policy, reference),
            1.0 / policy.head.temperature, ENTROPY=entropy, **_options(policy, reference),
        )  # fmt: skip
    return states


def gradients(
    policy: Side, reference: Side, local: Tensor, slopes: KlSlopes, wanted: tuple[bool, bool, bool]
) -> Gradients:
    """The policy's dX `[T, H]` fp32 (this rank's part of the sum), dW and db in their inputs' dtypes."""
    tokens = local.shape[0]
    sums = GradientSums(policy.x, policy.weight, policy.bias, wanted)
    packed = torch.cat([pack_slopes(slopes.policy), torch.stack([slopes.ref_top, slopes.of_kl, slopes.offset])])
    ours, theirs = ChunkProducts(policy.x, policy.weight), ChunkProducts(reference.x, reference.weight)
    for span in ours:
        z, y, dz = ours.of(span), theirs.of(span), ours.gradients(span)
        columns, start, stride = ours.shape(span)
        SLOPE(
            (tokens, triton.cdiv(columns, SLOPE.blocks["BLOCK"])), z, y, dz, pointer(policy.bias, policy.x),
            pointer(reference.bias, reference.x), local, packed, tokens, columns, start, stride,
            *_numbers(policy, reference), policy.head.temperature,
            ENTROPY=slopes.policy.of_plogp is not None, **_options(policy, reference),
        )  # fmt: skip
        sums.add(span, policy.weight[span], dz)
    return sums.dx, sums.dweight, sums.dbias


def _numbers(policy: Side, reference: Side) -> tuple[float, ...]:
    return *head_numbers(policy.head)[:2], *head_numbers(reference.head)[:2]


def _options(policy: Side, reference: Side) -> dict[str, bool]:
    return {
        "HAS_BIAS": policy.bias is not None,
        "SOFTCAP": policy.head.softcap is not None,
        "REF_BIAS": reference.bias is not None,
        "REF_SOFTCAP": reference.head.softcap is not None,
    }


def forms() -> list[Form]:
    """For the compile check: everything on and everything off."""
    found = []
    for dtype, on in [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)]:
        kind = TYPES[dtype]
        options = dict.fromkeys(("HAS_BIAS", "SOFTCAP", "REF_BIAS", "REF_SOFTCAP", "ENTROPY"), on)
        shared = dict.fromkeys(("products", "ref_products"), "*fp32")
        shared |= dict.fromkeys(("columns", "start", "stride"), "i32")
        shared |= dict.fromkeys(("scale", "softcap", "ref_scale", "ref_softcap"), "fp32")
        shared |= {"bias": f"*{kind}", "ref_bias": f"*{kind}", "local": "*i64"}
        state_types = shared | {"states": "*fp32", "inverse_temperature": "fp32"}
        slope_types = shared | {"gradients": f"*{kind}", "slopes": "*fp32", "tokens": "i32", "temperature": "fp32"}
        word = "all" if on else "none"
        found.append(Form(f"linear_kl state {kind} {word}", STATE, state_types, options))
        found.append(Form(f"linear_kl slope {kind} {word}", SLOPE, slope_types, options))
    return found
