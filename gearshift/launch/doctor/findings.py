"""What a check says: ok, worth a note, or WRONG, which would break a run."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, WRONG = "ok", "note", "WRONG"


@dataclass(frozen=True)
class Finding:
    """`what` was looked at, what was `found`, and, unless it is ok, what `to_do` about it."""

    level: str
    what: str
    found: str
    to_do: str = ""

    def line(self) -> str:
        return f"{self.level:<6}{self.what:<18}{self.found}" + (f": {self.to_do}" if self.to_do else "")


def ok(what: str, found: str) -> Finding:
    return Finding(OK, what, found)


def note(what: str, found: str, to_do: str) -> Finding:
    return Finding(NOTE, what, found, to_do)


def wrong(what: str, found: str, to_do: str) -> Finding:
    return Finding(WRONG, what, found, to_do)
