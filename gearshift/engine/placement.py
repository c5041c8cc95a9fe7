"""Which ranks hold one tensor-parallel replica together, and which part of it each of them holds.

Letters: N ranks, t of a tensor-parallel group, L ranks on a host.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """`ranks` in all, `per_host` on each host (numbered host by host), in groups of `tp_size`.

    On one host the parts are laid out as ZeRO-3 lays out its shards: rank r holds part r·t // N, so that what a rank
    needs and what it has overlap most. Over several hosts a group stays inside one, as consecutive ranks. (A group
    larger than a host spans several, and its all-reduces cross the network.)
    """

    ranks: int
    tp_size: int
    per_host: int

    def __post_init__(self) -> None:
        if self.ranks % self.tp_size:
            raise ValueError(f"tensor-parallel groups of {self.tp_size} do not divide {self.ranks} ranks")

    @property
    def one_host(self) -> bool:
        return self.per_host >= self.ranks

    @property
    def group_count(self) -> int:
        return self.ranks // self.tp_size

    def part(self, rank: int) -> int:
        """The rank's place in its group: which part of every split parameter it holds."""
        return rank * self.tp_size // self.ranks if self.one_host else rank % self.tp_size

    def group(self, index: int) -> list[int]:
        """The ranks of a group, in the order of their parts."""
        if self.one_host:
            return list(range(index, self.ranks, self.group_count))
        return list(range(index * self.tp_size, (index + 1) * self.tp_size))

    def group_of(self, rank: int) -> int:
        return rank % self.group_count if self.one_host else rank // self.tp_size

    def host(self, rank: int) -> int:
        return rank // self.per_host


def named(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 0 to 3`, or `ranks 0 to 3, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
