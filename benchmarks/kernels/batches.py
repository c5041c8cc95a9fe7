"""What the benchmarks of `ppo_targets` and of the two losses share: batches of right-padded sequences.

Letters: B sequences, L response length.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor


def shape_of(options: argparse.Namespace, length: int) -> dict[str, Any]:
    return {"B": options.sequences, "L": length, "dtype": "float32"}


def stated_length(lengths: list[int]) -> int:
    """The length that figures are stated for, 1,024, or else the longest."""
    return 1024 if 1024 in lengths else max(lengths)


class Batch:
    """Random numbers `[B, L]` on the device, always the same ones, and a mask of lengths from L / 2 to L."""

    def __init__(self, options: argparse.Namespace, length: int):
        self._rng = torch.Generator().manual_seed(0)
        self._shape, self._device = (options.sequences, length), options.device
        lengths = torch.randint(length // 2, length + 1, (options.sequences, 1), generator=self._rng)
        self.mask = (torch.arange(length) < lengths).to(options.device)

    def noise(self, size: float = 1.0) -> Tensor:
        return (size * torch.randn(self._shape, generator=self._rng)).to(self._device)

    def scores(self) -> Tensor:
        """`[B]`."""
        return torch.randn(self._shape[0], generator=self._rng).to(self._device)
