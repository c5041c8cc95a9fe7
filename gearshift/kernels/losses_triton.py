"""`policy_loss` and `value_loss` on GPUs: one kernel forms the gradient and each block's sums, a second adds those up.

All arithmetic is in fp64, a few operations for each element that is read: what is stored is the exact result rounded
once, the ratio minus 1 minus its logarithm keeps its digits near 0, and sums need no care. The blocks' sums are added
in their order, without atomics: the same bits every time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels have no types of Python: Triton takes those of the call.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gearshift.kernels import checks
from gearshift.kernels.losses import Formed
from gearshift.kernels.triton_launch import TYPES, Form, Launch

# Numbers that a block sums up: first the loss before it is divided, then the metrics, tokens before all others.
POLICY_SUMS, VALUE_SUMS = 5, 7


@triton.jit
def log_ratio(logprobs, other):
    """See `losses.log_ratio`."""
    both = (logprobs == -float("inf")) & (other == -float("inf"))
    return tl.where(both, 0.0, logprobs - other)


@triton.jit
def clamp(x, low, high):
    """NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def divisor(tokens, count, COUNTED: tl.constexpr):
    """The number of tokens: from a tensor if it is COUNTED there, so that the host need not wait for it."""
    if COUNTED:
        return tl.load(tokens).to(tl.float64)
    else:
        return tl.full((), count, tl.float64)


@triton.jit
def policy_kernel(
    logprobs, old_logprobs, advantages, mask, gradient, sums, tokens, elements,
    count: tl.float64, clip: tl.float64, dual_clip: tl.float64,
    COUNTED: tl.constexpr, DUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one block: the gradient, and its part of the sums [POLICY_SUMS, blocks]."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    live = tl.load(mask + at, mask=inside, other=0) != 0
    new = tl.load(logprobs + at, mask=live, other=0.0).to(tl.float64)
    old = tl.load(old_logprobs + at, mask=live, other=0.0).to(tl.float64)
    advantage = tl.load(advantages + at, mask=live, other=0.0).to(tl.float64)
    log_r = log_ratio(new, old)
    ratio = tl.exp(log_r)
    free = tl.where(advantage == 0.0, 0.0, ratio * advantage)
    bound = clamp(ratio, 1.0 - clip, 1.0 + clip) * advantage
    clipped = bound < free
    objective = tl.where(clipped, bound, free)
    if DUAL:
        floor = tl.where(advantage < 0.0, dual_clip * advantage, -float("inf"))
        clipped = clipped | (floor > objective)
        objective = tl.where(floor > objective, floor, objective)
    slope = tl.where(live & (clipped == 0), -free / divisor(tokens, count, COUNTED), 0.0)
    tl.store(gradient + at, slope.to(gradient.dtype.element_ty), mask=inside)
    blocks = tl.num_programs(0)
    tl.store(sums + block, -tl.sum(objective, 0))
    tl.store(sums + blocks + block, tl.sum(live.to(tl.float64), 0))
    tl.store(sums + 2 * blocks + block, tl.sum(clipped.to(tl.float64), 0))
    tl.store(sums + 3 * blocks + block, tl.sum(tl.where(live, ratio - 1.0 - log_r, 0.0), 0))
    tl.store(sums + 4 * blocks + block, tl.sum(tl.where(live, ratio, 0.0), 0))


@triton.jit
def value_kernel(
    values, old_values, returns, mask, gradient, sums, tokens, elements, count: tl.float64, clip: tl.float64,
    COUNTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one block: the gradient, and its part of the sums [VALUE_SUMS, blocks]."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    live = tl.load(mask + at, mask=inside, other=0) != 0
    new = tl.load(values + at, mask=live, other=0.0).to(tl.float64)
    old = tl.load(old_values + at, mask=live, other=0.0).to(tl.float64)
    target = tl.load(returns + at, mask=live, other=0.0).to(tl.float64)
    error = target - new
    free = error * error
    off = target - clamp(new, old - clip, old + clip)
    bound = off * off
    clipped = bound > free
    slope = tl.where(live & (clipped == 0), -error / divisor(tokens, count, COUNTED), 0.0)
    tl.store(gradient + at, slope.to(gradient.dtype.element_ty), mask=inside)
    blocks = tl.num_programs(0)
    tl.store(sums + block, 0.5 * tl.sum(tl.where(clipped, bound, free), 0))
    tl.store(sums + blocks + block, tl.sum(live.to(tl.float64), 0))
    tl.store(sums + 2 * blocks + block, tl.sum(clipped.to(tl.float64), 0))
    tl.store(sums + 3 * blocks + block, tl.sum(target, 0))
    tl.store(sums + 4 * blocks + block, tl.sum(target * target, 0))
    tl.store(sums + 5 * blocks + block, tl.sum(error, 0))
    tl.store(sums + 6 * blocks + block, tl.sum(free, 0))


@triton.jit
def total_kernel(
    sums, loss, metrics, tokens, numbers, blocks, count: tl.float64, COUNTED: tl.constexpr, BLOCK: tl.constexpr
):
    """The blocks' sums [numbers, blocks], added up: the first, divided, is the loss and the others are the metrics."""
    number = tl.arange(0, 8)
    parts = tl.zeros((8, BLOCK), tl.float64)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        inside = (number < numbers)[:, None] & (block < blocks)[None, :]
        parts += tl.load(sums + number[:, None] * blocks + block[None, :], mask=inside, other=0.0)
    total = tl.sum(parts, 1)
    unscaled = tl.sum(tl.where(number == 0, total, 0.0), 0)
    live = tl.sum(tl.where(number == 1, total, 0.0), 0)
    # See `losses.divisor`: without any token the loss is 0, not 0/0.
    by = divisor(tokens, count, COUNTED)
    by = tl.where(live > 0.0, by, tl.maximum(by, 1.0))
    tl.store(loss, (unscaled / by).to(loss.dtype.element_ty))
    tl.store(metrics + number - 1, total, mask=(number > 0) & (number < numbers))


POLICY = Launch(policy_kernel, {"BLOCK": 1024}, num_warps=4)
VALUE = Launch(value_kernel, {"BLOCK": 1024}, num_warps=4)
TOTAL = Launch(total_kernel, {"BLOCK": 128}, num_warps=4)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float, dual_clip: float | None,
    tokens: Tensor | None, count: int,
) -> Formed:  # fmt: skip
    """As `policy_loss.vectorized`."""
    tensors = (logprobs, old_logprobs, advantages)
    options = {"DUAL": dual_clip is not None}
    return _form(POLICY, POLICY_SUMS, tensors, mask, tokens, count, (clip, dual_clip or 0.0), options)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float, tokens: Tensor | None, count: int
) -> Formed:
    """As `value_loss.vectorized`."""
    return _form(VALUE, VALUE_SUMS, (values, old_values, returns), mask, tokens, count, (clip,), {})


def _form(
    launch: Launch, numbers: int, tensors: tuple[Tensor, ...], mask: Tensor, tokens: Tensor | None, count: int,
    settings: tuple[float, ...], options: dict[str, Any],
) -> Formed:  # fmt: skip
    dtype = checks.accumulation_dtype(*tensors)
    elements = mask.numel()
    blocks = triton.cdiv(elements, launch.blocks["BLOCK"])
    gradient = torch.empty(mask.shape, dtype=dtype, device=mask.device)
    sums = torch.empty(numbers, blocks, dtype=torch.float64, device=mask.device)
    loss = torch.empty((), dtype=dtype, device=mask.device)
    metrics = torch.empty(numbers - 1, dtype=torch.float64, device=mask.device)
    counted = mask if tokens is None else tokens  # a kernel takes a pointer even where it reads nothing
    options = options | {"COUNTED": tokens is not None}
    launch(
        (blocks,), *(tensor.contiguous() for tensor in tensors), mask.contiguous(), gradient, sums, counted, elements,
        float(count), *settings, **options,
    )  # fmt: skip
    TOTAL((1,), sums, loss, metrics, counted, numbers, blocks, float(count), COUNTED=tokens is not None)
    return Formed(loss, metrics, gradient)


def forms() -> list[Form]:
    """Every flag of every kernel, on and off, and every dtype."""

    def types(names: tuple[str, ...], dtype: torch.dtype) -> dict[str, str]:
        found = dict.fromkeys(names, f"*{TYPES[dtype]}")
        return (
            found
            | {"mask": "*i1", "gradient": "*fp32", "elements": "i32", "clip": "fp64", "dual_clip": "fp64"}
            | common
        )

    common = {"sums": "*fp64", "tokens": "*i64", "count": "fp64"}
    total = common | {"loss": "*fp32", "metrics": "*fp64", "numbers": "i32", "blocks": "i32"}
    policy, value = ("logprobs", "old_logprobs", "advantages"), ("values", "old_values", "returns")
    plain, full = {"COUNTED": False, "DUAL": False}, {"COUNTED": True, "DUAL": True}
    return [
        Form("policy_loss fp32", POLICY, types(policy, torch.float32), plain),
        Form("policy_loss bf16 counted dual", POLICY, types(policy, torch.bfloat16), full),
        Form("value_loss fp32", VALUE, types(value, torch.float32), {"COUNTED": False}),
        Form("value_loss fp16 counted", VALUE, types(value, torch.float16), {"COUNTED": True}),
        Form("losses total", TOTAL, total, {"COUNTED": False}),
        Form("losses total counted", TOTAL, total, {"COUNTED": True}),
    ]
