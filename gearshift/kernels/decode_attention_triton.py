"""`decode_attention` on GPUs: a program for each row, key/value head and part of the cache's columns, then one for each
row and head that puts the parts together.

All query heads of a key/value head are one tile, so that the cache is read once. The first kernel also writes the new
key and value; it takes them from where they came from, so that no program waits for another.
Letters: n rows, h query heads, k key/value heads, g query heads of each, D size of a query or key head, E of a value
head, C capacity, S parts.
"""

# What Triton compiles is no Python with types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from gearshift.kernels.triton_head import pointer, tanh
from gearshift.kernels.triton_launch import TYPES, Form, Launch

if TYPE_CHECKING:
    from gearshift.kernels.decode_attention import Columns

# Programs that keep a large GPU busy, and the fewest columns that are worth one of their own.
PROGRAMS, FEWEST = 264, 128


@triton.jit
def part_kernel(
    query, key, value, keys, values, positions, tops, sums, outs, query_row, query_head, key_row, key_head, value_row,
    value_head, kv_heads, group, key_size, value_size, capacity, part, window, scaling, softcap, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, INTERPRETED: tl.constexpr, GROUP: tl.constexpr, KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of one row's query heads over `part` columns: the largest score, the sum of exp(score - largest), and the values
    weighted by these. `query_row` and the like: strides."""
    row, kv_head, number = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    position = tl.load(positions + row)
    member = tl.arange(0, GROUP)
    d = tl.arange(0, KEY_SIZE)
    e = tl.arange(0, VALUE_SIZE)
    has_d, has_e = d < key_size, e < value_size
    heads = kv_head * group + member
    own = query + row * query_row + heads[:, None] * query_head + d[None, :]
    q = tl.load(own, mask=(member < group)[:, None] & has_d[None, :], other=0.0)
    new_k = tl.load(key + row * key_row + kv_head * key_head + d, mask=has_d, other=0.0)
    new_v = tl.load(value + row * value_row + kv_head * value_head + e, mask=has_e, other=0.0)
    lane = (row * kv_heads + kv_head) * capacity
    begin = number * part
    end = tl.minimum(begin + part, position + 1)
    low = begin.to(tl.int64)
    if WINDOW:
        low = tl.maximum(low, position - window + 1)
    if (begin <= position) & (position < begin + part):
        tl.store(keys + (lane + position) * key_size + d, new_k, mask=has_d)
        tl.store(values + (lane + position) * value_size + e, new_v, mask=has_e)
    if INTERPRETED:  # the interpreter multiplies bf16 wrongly
        q = q.to(tl.float32)
    m = tl.full((GROUP,), -float("inf"), tl.float32)
    s = tl.zeros((GROUP,), tl.float32)
    out = tl.zeros((GROUP, VALUE_SIZE), tl.float32)
    for first in range((low - begin) // COLUMNS * COLUMNS + begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        seen = (column >= low) & (column < end)
        cached = seen & (column < position)
        k = tl.load(keys + (lane + column)[:, None] * key_size + d[None, :], mask=cached[:, None] & has_d, other=0.0)
        k = tl.where((column == position)[:, None], new_k[None, :], k)
        v = tl.load(
            values + (lane + column)[:, None] * value_size + e[None, :], mask=cached[:, None] & has_e, other=0.0
        )
        v = tl.where((column == position)[:, None], new_v[None, :], v)
        if INTERPRETED:
            k = k.to(tl.float32)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if SOFTCAP:
            score = softcap * tanh(score / softcap)
        score = tl.where(seen[None, :], score, -float("inf"))
        top = tl.maximum(m, tl.max(score, 1))
        factor = tl.exp(m - top)  # the first columns of a part are seen: top is finite
        p = tl.exp(score - top[:, None])
        s = s * factor + tl.sum(p, 1)
        weights = p.to(v.dtype)
        if INTERPRETED:
            weights, v = weights.to(tl.float32), v.to(tl.float32)
        out = out * factor[:, None] + tl.dot(weights, v, input_precision="ieee")
        m = top
    lanes = ((row * kv_heads * group + heads) * tl.num_programs(2)) + number
    tl.store(tops + lanes, m, mask=member < group)
    tl.store(sums + lanes, s, mask=member < group)
    tl.store(outs + lanes[:, None] * value_size + e[None, :], out, mask=(member < group)[:, None] & has_e[None, :])


@triton.jit
def whole_kernel(
    tops, sums, outs, sinks, out, heads, parts, value_size, SINKS: tl.constexpr, PARTS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
):  # fmt: skip
    """Of one row and head: its parts as one softmax, with the sink's score in the sum. A row without columns is 0."""
    lane = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, PARTS)
    there = number < parts
    e = tl.arange(0, VALUE_SIZE)
    m = tl.load(tops + lane * parts + number, mask=there, other=-float("inf"))
    s = tl.load(sums + lane * parts + number, mask=there, other=0.0)
    values = tl.load(
        outs + (lane * parts + number)[:, None] * value_size + e[None, :],
        mask=there[:, None] & (e < value_size)[None, :], other=0.0,
    )  # fmt: skip
    top = tl.max(m, 0)
    sink = -float("inf")
    if SINKS:
        sink = tl.load(sinks + lane % heads).to(tl.float32)
        top = tl.maximum(top, sink)
    top = tl.where(top == -float("inf"), 0.0, top)
    factor = tl.exp(m - top)
    total = tl.sum(s * factor, 0)
    if SINKS:
        total += tl.exp(sink - top)
    found = tl.sum(values * factor[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + lane * value_size + e, found.to(out.dtype.element_ty), mask=e < value_size)


PART = Launch(part_kernel, {}, num_warps=4, num_stages=2)
WHOLE = Launch(whole_kernel, {}, num_warps=4)


def attend(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, columns: Columns, scaling: float,
    window: int | None, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `decode_attention`. A row whose position is -1 writes nothing and gets 0."""
    rows, heads, key_size = query.shape
    kv_heads, value_size = keys.shape[1], values.shape[3]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    assert keys.is_contiguous()
    assert values.is_contiguous()
    tile = tile_columns(query.dtype)
    part, parts = split(rows * kv_heads, columns.width, tile)
    tops, sums = (query.new_empty(rows, heads, parts, dtype=torch.float32) for _ in range(2))
    outs = query.new_empty(rows, heads, parts, value_size, dtype=torch.float32)
    out = query.new_empty(rows, heads, value_size)
    size = block(value_size)
    PART(
        (rows, kv_heads, parts), query, key, value, keys, values, columns.positions, tops, sums, outs,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], kv_heads, heads // kv_heads, key_size, value_size,
        keys.shape[2], part, window or 0, scaling, softcap or 1.0, WINDOW=window is not None,
        SOFTCAP=softcap is not None, INTERPRETED=not query.is_cuda, GROUP=block(heads // kv_heads),
        KEY_SIZE=block(key_size), VALUE_SIZE=size, COLUMNS=tile,
    )  # fmt: skip
    WHOLE(
        (rows * heads,), tops, sums, outs, pointer(sinks, query), out, heads, parts, value_size,
        SINKS=sinks is not None, PARTS=triton.next_power_of_2(parts), VALUE_SIZE=size,
    )  # fmt: skip
    return out


def split(lanes: int, width: int, tile: int) -> tuple[int, int]:
    """Columns of a part, a multiple of a tile's, and how many parts `width` columns are."""
    wanted = max(1, min(PROGRAMS // max(1, lanes), width // FEWEST))
    part = triton.cdiv(triton.cdiv(width, wanted), tile) * tile
    return part, triton.cdiv(width, part)


def tile_columns(dtype: torch.dtype) -> int:
    """As many as leave nothing outside of the registers."""
    return 16 if dtype == torch.float32 else 64


def block(size: int) -> int:
    """A product needs 16 or more, a tile a power of two."""
    return max(16, triton.next_power_of_2(size))


def forms() -> list[Form]:
    """For the compile check."""
    found = []
    for dtype, on, size in [(torch.bfloat16, False, 64), (torch.float16, True, 128), (torch.float32, True, 64)]:
        kind, product = TYPES[dtype], "fp32" if dtype == torch.float32 else "narrow"
        tensors = dict.fromkeys(("query", "key", "value", "keys", "values"), f"*{kind}")
        partial = dict.fromkeys(("tops", "sums", "outs"), "*fp32")
        sizes = (
            "query_row", "query_head", "key_row", "key_head", "value_row", "value_head", "kv_heads", "group",
            "key_size", "value_size", "capacity", "part", "window",
        )  # fmt: skip
        blocks = {"GROUP": 16, "KEY_SIZE": size, "VALUE_SIZE": size, "COLUMNS": tile_columns(dtype)}
        types = {
            **tensors, "positions": "*i64", **partial, **dict.fromkeys(sizes, "i32"), "scaling": "fp32",
            "softcap": "fp32",
        }  # fmt: skip
        options = {"WINDOW": on, "SOFTCAP": on, "INTERPRETED": False, **blocks}
        found.append(Form(f"decode_attention part {kind} {on}", PART, types, options, product=product))
        types = {
            **partial, "sinks": f"*{kind}", "out": f"*{kind}", **dict.fromkeys(("heads", "parts", "value_size"), "i32")
        }  # fmt: skip
        options = {"SINKS": on, "PARTS": 8, "VALUE_SIZE": size}
        found.append(Form(f"decode_attention whole {kind} {on}", WHOLE, types, options))
    return found
