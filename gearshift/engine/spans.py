"""Named parts of a run, for whoever listens: a profile, and nobody else. Without a listener they cost a function call.

A part within another is told by its path, "train/policy".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from gearshift.engine.work import Work


class Listener(Protocol):
    def step(self, number: int) -> AbstractContextManager[None]:
        """Around one iteration of PPO, or one optimizer step of the other stages."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """Around a part of it."""

    @property
    def counting(self) -> bool:
        """Whether `count` is of use now."""

    def count(self, work: Work) -> None:
        """Work of this rank in the present span."""


_listener: Listener | None = None


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """All that follows is told to `listener`."""
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None


def step(number: int) -> AbstractContextManager[None]:
    """One iteration of PPO, or one optimizer step of the other stages."""
    return nullcontext() if _listener is None else _listener.step(number)


@contextmanager
def span(name: str) -> Iterator[None]:
    """A part of a step; also a decorator."""
    if _listener is None:
        yield
        return
    with _listener.span(name):
        yield


def count(work: Callable[[], Work]) -> None:
    """Work of this rank in the present span; worked out only for who listens."""
    if _listener is not None and _listener.counting:
        _listener.count(work())
