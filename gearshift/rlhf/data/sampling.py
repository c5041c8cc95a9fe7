"""Which rows come when: one global order, the same for every number of ranks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gearshift.errors import UserError

Item = TypeVar("Item")
NOTHING = -1  # a place in an evaluation batch that holds no row


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

    @property
    def cursor(self) -> tuple[int, int]:
        """Epoch, and rows of it already drawn."""
        return divmod(self.position, self.rows)

    def steps(self, epochs: float) -> int:
        """Batches until every row was drawn `epochs` times; the last is filled up from the epoch after."""
        return -(-round(epochs * self.rows) // self.batch_size)

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        epoch, offset = self.cursor
        return {"epoch": epoch, "offset": offset, "rows": self.rows, "seed": self.seed}

    def load_state(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken; the batch size may differ. Raises UserError if the data or seed do."""
        for name, now in (("rows", self.rows), ("seed", self.seed)):
            if state[name] != now:
                raise UserError(f"the data has changed since the checkpoint: {name} was {state[name]}, now {now}")
        self.position = state["epoch"] * self.rows + state["offset"]

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


def evaluation_batches(rows: int, batch_size: int, rank: int, world: int) -> list[list[int]]:
    """All rows once and in order, over the ranks: as many batches for each, of at most `batch_size` rows per rank.

    Under ZeRO-3 every rank must run as many forwards as the others, so what does not divide is filled with `NOTHING`.
    """
    per_rank = -(-rows // world)
    mine = [row if row < rows else NOTHING for row in range(rank * per_rank, (rank + 1) * per_rank)]
    return [mine[at : at + batch_size] for at in range(0, per_rank, batch_size)]
