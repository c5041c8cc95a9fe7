"""Which rows come when: one global order, the same for every number of ranks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Draw:
    """One global batch: its row numbers, and for each which draw of the run it is (counted from 0, never repeated)."""

    rows: list[int]
    draws: list[int]


class Sampler:
    """Draws global batches without end: a fresh seeded shuffle per epoch, epochs joined without a gap.

    A batch that reaches the end of an epoch goes on into the next, so every batch is full and no row is left out.
    Draw d is row d % rows of the shuffle of epoch d // rows: a function of the seed and the position, not of history.
    """

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        if rows < 1 or batch_size < 1:
            raise ValueError(f"a sampler needs rows and a batch size, not {rows} and {batch_size}")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.position = 0  # the next draw
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def __iter__(self) -> Iterator[Draw]:
        return self

    def __next__(self) -> Draw:
        draws = list(range(self.position, self.position + self.batch_size))
        self.position += self.batch_size
        return Draw([self._row(draw) for draw in draws], draws)

    def state(self) -> int:
        """What a checkpoint holds of it."""
        return self.position

    def set_state(self, state: int) -> None:
        self.position = state

    def steps(self, epochs: float) -> int:
        """Batches until every row was drawn `epochs` times; the last is filled up from the epoch after."""
        return -(-round(epochs * self.rows) // self.batch_size)

    def _row(self, draw: int) -> int:
        epoch, offset = divmod(draw, self.rows)
        if self._shuffled[0] != epoch:
            order = list(range(self.rows))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)  # seeded by text: the same on every machine
            self._shuffled = (epoch, order)
        return self._shuffled[1][offset]


def rank_part(batch: Sequence[Item], rank: int, world: int) -> Sequence[Item]:
    """This rank's contiguous part of a global batch, which must divide by the number of ranks."""
    if len(batch) % world:
        raise ValueError(f"a global batch of {len(batch)} rows does not divide by {world} ranks")
    size = len(batch) // world
    return batch[rank * size : (rank + 1) * size]
