"""Rows that cannot be used: each counted and named, by the reason that it was left out for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from gearshift.errors import UserError

NAMED = 3  # rows left out for one reason that a line of the log names; left_out.txt in the run folder has them all
Row = TypeVar("Row")


@dataclass(frozen=True)
class Encoded(Generic[Row]):
    """The rows that were kept, how many were read, and which were left out for which reason.

    `dropped`: reason -> `file:line` of each row, for a broken one all that is wrong with it.
    """

    rows: list[Row]
    read: int
    dropped: dict[str, list[str]]

    def describe(self) -> str:
        """One line for the log: '5,843 of 6,000 rows; left out: 157 over data.max_tokens=64 (a.jsonl:3, ...)'."""
        left_out = self.left_out()
        return f"{len(self.rows):,} of {self.read:,} rows" + (f"; {left_out}" if left_out else "")

    def left_out(self) -> str:
        """What `describe` says of the rows that were left out; nothing where none was."""
        reasons = ", ".join(_named(reason, rows) for reason, rows in self.dropped.items())
        return f"left out: {reasons}" if reasons else ""


def _named(reason: str, rows: list[str]) -> str:
    """'157 over data.max_tokens=64 (a.jsonl:3, a.jsonl:9, a.jsonl:17, ...)'."""
    more = ", ..." if len(rows) > NAMED else ""
    return f"{len(rows):,} {reason} ({', '.join(rows[:NAMED])}{more})"


class Drop:
    """Names the rows that are left out, by reason. `skip`: those that are broken too, which else raise UserError."""

    def __init__(self, read: int, skip: bool) -> None:
        self.read, self.skip, self.reasons = read, skip, dict[str, list[str]]()

    def because(self, reason: str, row: str) -> bool:
        self.reasons.setdefault(reason, []).append(row)
        return True

    @contextmanager
    def broken(self) -> Iterator[None]:
        """A UserError in here is one broken row."""
        try:
            yield
        except UserError as error:
            if not self.skip:
                raise
            self.because("broken", str(error))

    def encoded(self, kept: list[Row]) -> Encoded[Row]:
        encoded = Encoded(kept, self.read, self.reasons)
        if not kept:
            raise UserError(f"no row of the data is left: {encoded.describe()}")
        return encoded
