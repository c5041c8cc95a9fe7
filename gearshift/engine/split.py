"""How one parameter is split over the ranks of a tensor-parallel group.

Letters: t ranks of a group, r one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Range = tuple[int, int]


@dataclass(frozen=True)
class Split:
    """Rank r holds the ranges `ranges[r]` of dimension `dim`, one behind the other; `dim` None: every rank holds all.

    One range is a plain split. A parameter that packs several matrices (queries, keys and values; gate and up) gives
    each rank a range of each.
    """

    dim: int | None = None
    ranges: tuple[tuple[Range, ...], ...] = ()

    @classmethod
    def plain(cls, dim: int, ranges: Iterable[Range]) -> Split:
        """`ranges`: the one range of each rank."""
        return cls(dim, tuple((one,) for one in ranges))

    @classmethod
    def packed(cls, dim: int, matrices: Sequence[tuple[int, Sequence[Range]]]) -> Split:
        """`matrices`: of each packed matrix its size in `dim`, and the range of it that each rank holds."""
        held: list[list[Range]] = [[] for _ in matrices[0][1]]
        start = 0
        for size, ranges in matrices:
            for own, (low, high) in zip(held, ranges, strict=True):
                own.append((start + low, start + high))
            start += size
        return cls(dim, tuple(tuple(own) for own in held))

    def width(self, rank: int) -> int:
        """Size of the rank's slice in `dim`."""
        return sum(high - low for low, high in self.ranges[rank])

    def shape(self, whole: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """Shape of the slice that the rank holds."""
        if self.dim is None:
            return whole
        return (*whole[: self.dim], self.width(rank), *whole[self.dim + 1 :])

    def cut(self, whole: Tensor, rank: int) -> Tensor:
        """The rank's slice of a whole tensor (a view when it is one range)."""
        if self.dim is None:
            return whole
        parts = [whole.narrow(self.dim, low, high - low) for low, high in self.ranges[rank]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)
