"""The language-model head as the kernels see it: what happens to hidden·weight before the softmax.

Letters: T tokens, H hidden, V vocabulary rows of this rank, C columns of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gearshift.kernels import checks

# Columns held at once: 32 MiB of logits at 2,048 tokens, where all of V=50257 would be 392 MiB.
CHUNK = 4096


@dataclass(frozen=True)
class Head:
    """z = scale·(hidden·weight + bias), then softcap·tanh(z / softcap) if given, then z / temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        checks.require(self.temperature > 0, f"temperature must be above 0, got {self.temperature}")
        checks.require(self.softcap is None or self.softcap > 0, f"softcap must be above 0, got {self.softcap}")

    def logits(self, product: Tensor) -> Tensor:
        """The definition. `product` is hidden·weight + bias."""
        z = product * self.scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature

    def logits_(self, product: Tensor) -> Tensor:
        """The same in place, with the constants folded."""
        if self.softcap is None:
            factor = self.scale / self.temperature
            return product if factor == 1.0 else product.mul_(factor)
        return product.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    @property
    def slope(self) -> float:
        """The constant part of dz/dproduct."""
        return self.scale / self.temperature

    def tanh_slope(self, z: Tensor) -> Tensor | None:
        """The part of dz/dproduct that differs per logit: 1 − tanh², None without a soft-cap."""
        if self.softcap is None:
            return None
        return (z * (self.temperature / self.softcap)).square_().neg_().add_(1.0)


def spans(rows: int, width: int) -> Iterator[slice]:
    """The chunks of a vocabulary of `rows` rows."""
    for start in range(0, rows, width):
        yield slice(start, min(start + width, rows))


def chunk_view(buffer: Tensor, tokens: int, span: slice) -> Tensor:
    """The start of a flat buffer as a contiguous `[T, C]`."""
    columns = span.stop - span.start
    return buffer[: tokens * columns].view(tokens, columns)


@dataclass
class Chunks:
    """The logits of one head, a chunk of columns at a time, in the dtype of `x [T, H]`; one buffer serves all chunks.

    For processors: a half-precision weight is widened a chunk at a time, since its products are slow there.
    """

    x: Tensor
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    head: Head
    width: int = CHUNK

    def __post_init__(self) -> None:
        self._buffer = self.buffer()

    def buffer(self) -> Tensor:
        """Room for one more chunk of this size."""
        return self.x.new_empty(self.x.shape[0] * min(self.width, self.weight.shape[0]))

    def rows(self, span: slice) -> Tensor:
        """The chunk's rows of the weight in the dtype of x."""
        return self.weight[span].to(self.x.dtype)

    def logits(self, span: slice, rows: Tensor) -> Tensor:
        """`[T, C]`, which the next call overwrites. `rows`: those of `rows(span)`."""
        z = chunk_view(self._buffer, self.x.shape[0], span)
        if self.bias is None:
            torch.mm(self.x, rows.T, out=z)
        else:
            torch.addmm(self.bias[span].to(self.x.dtype), self.x, rows.T, out=z)
        return self.head.logits_(z)
