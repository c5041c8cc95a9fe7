"""Rotary embedding of a step of decoding on GPUs (Su et al. 2021, arXiv 2104.09864, in the layout of halves): queries
and keys of one new position a row, in one launch.

Letters: n rows, h query heads, k key heads, D size of a head.
"""

# What Triton compiles is no Python with types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gearshift.kernels.triton_launch import TYPES, Form, Launch


@triton.jit
def rotary_kernel(
    query, key, cos, sin, query_out, key_out, query_row, query_head, key_row, key_head, cos_row, sin_row, heads,
    key_heads, half, HALF: tl.constexpr,
):  # fmt: skip
    """One head of one row: x · cos + (-second half, first half) · sin, each term rounded as torch rounds it."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, HALF)
    inside = at < half
    if head < heads:
        source = query + row * query_row + head * query_head
        target = query_out + (row * heads + head) * 2 * half
    else:
        source = key + row * key_row + (head - heads) * key_head
        target = key_out + (row * key_heads + head - heads) * 2 * half
    first = tl.load(source + at, mask=inside, other=0.0)
    second = tl.load(source + half + at, mask=inside, other=0.0)
    low = (first * tl.load(cos + row * cos_row + at, mask=inside, other=0.0)).to(first.dtype)
    low -= (second * tl.load(sin + row * sin_row + at, mask=inside, other=0.0)).to(first.dtype)
    high = (second * tl.load(cos + row * cos_row + half + at, mask=inside, other=0.0)).to(first.dtype)
    high += (first * tl.load(sin + row * sin_row + half + at, mask=inside, other=0.0)).to(first.dtype)
    tl.store(target + at, low.to(first.dtype), mask=inside)
    tl.store(target + half + at, high.to(first.dtype), mask=inside)


ROTARY = Launch(rotary_kernel, {}, num_warps=1, fuses=False)


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """query `[n, h, D]`, key `[n, k, D]`, cos and sin `[n or 1, D]`, all of one type -> both turned, contiguous."""
    query, key, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, cos, sin))
    turned = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    turned_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    rows, heads, size = query.shape
    angles = (x.stride(0) if x.shape[0] > 1 else 0 for x in (cos, sin))
    ROTARY(
        (rows, heads + key.shape[1]), query, key, cos, sin, turned, turned_key, *query.stride()[:2], *key.stride()[:2],
        *angles, heads, key.shape[1], size // 2, HALF=triton.next_power_of_2(max(1, size // 2)),
    )  # fmt: skip
    return turned, turned_key


def forms() -> list[Form]:
    """For the compile check."""
    tensors = ("query", "key", "cos", "sin", "query_out", "key_out")
    sizes = ("query_row", "query_head", "key_row", "key_head", "cos_row", "sin_row", "heads", "key_heads", "half")
    return [
        Form(f"rotary {TYPES[d]}", ROTARY, {**dict.fromkeys(tensors, f"*{TYPES[d]}"), **dict.fromkeys(sizes, "i32")},
             {"HALF": 64})
        for d in (torch.bfloat16, torch.float32)
    ]  # fmt: skip
