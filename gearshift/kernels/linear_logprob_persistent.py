"""The forward of `linear_logprob` as one kernel: every tile of logits is summed up while it is in registers.

As many programs as the GPU has multiprocessors share out (tile of tokens × split of the vocabulary); each walks its
split and keeps four numbers per token (see `states`). Nothing but those is written. Half precision only: tensor cores
multiply fp32 in TF32, which loses three digits.
Letters: T tokens, H hidden, V vocabulary rows of this rank.
"""

# What Triton compiles is no Python with types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gearshift.kernels.head import Head
from gearshift.kernels.states import merge
from gearshift.kernels.triton_head import finite, head_logits, head_numbers, pointer
from gearshift.kernels.triton_launch import TYPES, Form, Launch


@triton.jit
def update(
    product, first, vocab, target, m, s, e, y, bias, scale, softcap, inverse_temperature,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The numbers of a tile's tokens after `WIDTH` more columns, from `first` on."""
    column = first + tl.arange(0, WIDTH)
    inside = column < vocab
    offset = tl.zeros((WIDTH,), tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    z = head_logits(product, offset[None, :], scale, softcap, inverse_temperature, SOFTCAP)
    z = tl.where(inside[None, :], z, -float("inf"))
    # Padding past the last column may have the target's number on another rank: it is not its logit.
    hit = (column[None, :] == target[:, None]) & inside[None, :]
    y += tl.sum(tl.where(hit, z, 0.0), 1)
    top = tl.maximum(m, tl.max(z, 1))
    shift = tl.maximum(tl.where(s > 0.0, m - finite(top), 0.0), -1e4)
    factor = tl.exp(shift)
    d = tl.maximum(z - finite(top)[:, None], -1e4)
    p = tl.exp(d)
    if ENTROPY:
        e = factor * (e + shift * s) + tl.sum(p * d, 1)
    return top, factor * s + tl.sum(p, 1), e, y


@triton.jit
def persistent_kernel(
    hidden, weight, bias, local, states, tokens, hidden_size, vocab, split_columns, scale, softcap,
    inverse_temperature, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    INTERPRETED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`hidden`, `weight`: tensor descriptors of [ROWS, DEPTH] and [COLUMNS, DEPTH] tiles."""
    tiles = tl.cdiv(tokens, ROWS)
    HALF: tl.constexpr = COLUMNS // 2
    for item in range(tl.program_id(0), tiles * tl.cdiv(vocab, split_columns), tl.num_programs(0)):
        tile = item % tiles
        begin = item // tiles * split_columns
        end = tl.minimum(begin + split_columns, vocab)
        row = tile * ROWS + tl.arange(0, ROWS)
        there = row < tokens
        target = tl.load(local + row, mask=there, other=-1).to(tl.int32)
        m = tl.full((ROWS,), -float("inf"), tl.float32)
        s = tl.zeros((ROWS,), tl.float32)
        e = tl.zeros((ROWS,), tl.float32)
        y = tl.zeros((ROWS,), tl.float32)
        for first in range(begin, end, COLUMNS):
            product = tl.zeros((ROWS, COLUMNS), tl.float32)
            for k in range(0, hidden_size, DEPTH):
                x = hidden.load([tile * ROWS, k])
                w = weight.load([first, k])
                if INTERPRETED:  # the interpreter multiplies bf16 wrongly
                    x = x.to(tl.float32)
                    w = w.to(tl.float32)
                product = tl.dot(x, w.T, product, input_precision="ieee")
            # Half a tile at a time: the whole of it does not fit the registers beside the product.
            left, right = product.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
            m, s, e, y = update(
                left, first, vocab, target, m, s, e, y, bias, scale, softcap, inverse_temperature,
                HAS_BIAS, SOFTCAP, ENTROPY, HALF,
            )  # fmt: skip
            m, s, e, y = update(
                right, first + HALF, vocab, target, m, s, e, y, bias, scale, softcap, inverse_temperature,
                HAS_BIAS, SOFTCAP, ENTROPY, HALF,
            )  # fmt: skip
        here = (target >= begin) & (target < end)
        own = states + ((item // tiles).to(tl.int64) * tokens + row) * 4
        tl.store(own, m, mask=there)
        tl.store(own + 1, s, mask=there)
        tl.store(own + 2, e, mask=there)
        tl.store(own + 3, tl.where(here, y, float("nan")), mask=there)


PERSISTENT = Launch(persistent_kernel, {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64}, num_warps=8, num_stages=3)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can read these: half precision, in rows of whole 16-byte words."""
    return x.dtype in (torch.bfloat16, torch.float16) and x.shape[1] % 8 == 0 and x.numel() > 0 and weight.numel() > 0


def state(x: Tensor, weight: Tensor, bias: Tensor | None, local: Tensor, head: Head, entropy: bool) -> Tensor:
    """The states `[T, 4]` fp32 over this rank's vocabulary; `local [T]`: each target's row in `weight`, if here."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    blocks = PERSISTENT.blocks
    tokens, vocab = x.shape[0], weight.shape[0]
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    tiles, columns = triton.cdiv(tokens, blocks["ROWS"]), triton.cdiv(vocab, blocks["COLUMNS"])
    splits = min(columns, triton.cdiv(2 * programs, tiles))
    split_columns = triton.cdiv(columns, splits) * blocks["COLUMNS"]
    splits = triton.cdiv(vocab, split_columns)
    parts = x.new_empty(splits, tokens, 4, dtype=torch.float32)
    PERSISTENT(
        (min(programs, tiles * splits),),
        TensorDescriptor.from_tensor(x, [blocks["ROWS"], blocks["DEPTH"]]),
        TensorDescriptor.from_tensor(weight.contiguous(), [blocks["COLUMNS"], blocks["DEPTH"]]),
        pointer(bias, x), local, parts, tokens, x.shape[1], vocab, split_columns, *head_numbers(head),
        HAS_BIAS=bias is not None, SOFTCAP=head.softcap is not None, ENTROPY=entropy, INTERPRETED=not x.is_cuda,
    )  # fmt: skip
    return merge(parts)


def forms() -> list[Form]:
    """For the compile check."""
    found = []
    blocks = PERSISTENT.blocks
    for dtype, on in [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True)]:
        kind = TYPES[dtype]
        options = dict.fromkeys(("HAS_BIAS", "SOFTCAP", "ENTROPY"), on) | {"INTERPRETED": False}
        types = {
            "hidden": f"tensordesc<{kind}[{blocks['ROWS']},{blocks['DEPTH']}]>",
            "weight": f"tensordesc<{kind}[{blocks['COLUMNS']},{blocks['DEPTH']}]>",
            "bias": f"*{kind}", "local": "*i64", "states": "*fp32",
            **dict.fromkeys(("tokens", "hidden_size", "vocab", "split_columns"), "i32"),
            **dict.fromkeys(("scale", "softcap", "inverse_temperature"), "fp32"),
        }  # fmt: skip
        word = "all" if on else "none"
        found.append(Form(f"linear_logprob persistent {kind} {word}", PERSISTENT, types, options, product="half"))
    return found
