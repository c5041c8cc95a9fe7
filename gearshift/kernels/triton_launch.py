"""How the Triton kernels are compiled and launched, read by the launches themselves and by the compile check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# Types as the compiler names them.
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Launch:
    """A kernel with its block sizes and its numbers of warps and pipeline stages: one default for every device.

    `fuses`: a product and a sum may be one operation, with one rounding. `options`: constant arguments that pick a form
    of the kernel (with a bias, with an entropy), by name.
    """

    kernel: Any
    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 1
    fuses: bool = True

    def __call__(self, grid: tuple[int, ...] | Callable[..., tuple[int, ...]], *args: Any, **options: Any) -> None:
        """Runs it. Nothing to do is no launch."""
        if callable(grid) or all(grid):
            how = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.fuses}
            self.kernel[grid](*args, **options, **self.blocks, **how)


@dataclass(frozen=True)
class Form:
    """One compiled form of a kernel, as the compile check is to make it.

    `types`: argument -> "*fp32" (a pointer), "i32", "fp32" ...; `options`: the constant arguments; `product`: it
    multiplies matrices, with tensor cores for half precision and never in TF32 for fp32.
    """

    name: str
    launch: Launch
    types: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    product: str | None = None  # "half", "narrow" (half precision, fewer than 64 rows) or "fp32"
