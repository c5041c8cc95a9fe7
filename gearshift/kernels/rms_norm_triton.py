"""`rms_norm` on GPUs: one program a row, read once."""

# What Triton compiles is no Python with types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gearshift.kernels.triton_launch import TYPES, Form, Launch


@triton.jit
def norm_kernel(
    x, weight, out, features, eps, offset, ROUNDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * features
    feature = tl.arange(0, BLOCK)
    inside = feature < features
    wide = tl.load(x + row + feature, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + feature, mask=inside, other=0.0).to(tl.float32) + offset
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / features + eps)
    if ROUNDS:
        normed = normed.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row + feature, (normed * scale).to(out.dtype.element_ty), mask=inside)


NORM = Launch(norm_kernel, {}, num_warps=4)


def norm(x: Tensor, weight: Tensor, eps: float, offset: float, rounds: bool) -> Tensor:
    """See `rms_norm`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    features = x.shape[-1]
    block = triton.next_power_of_2(max(1, features))
    NORM((x.numel() // max(1, features),), x, weight, out, features, eps, offset, ROUNDS=rounds, BLOCK=block)
    return out


def forms() -> list[Form]:
    """For the compile check."""
    found = []
    for dtype, rounds in [(torch.bfloat16, True), (torch.float32, False)]:
        kind = TYPES[dtype]
        types = {
            **dict.fromkeys(("x", "weight", "out"), f"*{kind}"),
            "features": "i32",
            "eps": "fp32",
            "offset": "fp32",
        }
        found.append(Form(f"rms_norm {kind}", NORM, types, {"ROUNDS": rounds, "BLOCK": 4096}))
    return found
