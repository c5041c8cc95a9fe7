"""A run that is asked to stop: by a signal to one rank, or by a file that rank 0 sees."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gearshift.rlhf.signals import STOP_FILE, StopSignals


@pytest.fixture
def signals(tmp_path: Path) -> Iterator[StopSignals]:
    found = StopSignals(tmp_path)
    yield found
    found.close()


def rank(is_main: bool) -> Any:
    return SimpleNamespace(is_main=is_main, max=float)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted(signals: StopSignals, number: signal.Signals) -> None:
    assert signals.on_any_rank(rank(True)) == 0
    os.kill(os.getpid(), number)
    assert signals.on_any_rank(rank(True)) == number


def test_the_first_signal_counts(signals: StopSignals) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signals.on_any_rank(rank(True)) == signal.SIGTERM


def test_a_sigterm_after_it_ends_the_process(signals: StopSignals, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    os.kill(os.getpid(), signal.SIGUSR1)
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append((process, number)))
    signal.raise_signal(signal.SIGTERM)
    assert sent == [(os.getpid(), signal.SIGTERM)]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_file_asks_rank_0_once(signals: StopSignals, tmp_path: Path) -> None:
    (tmp_path / STOP_FILE).touch()
    assert signals.on_any_rank(rank(False)) == 0
    assert signals.on_any_rank(rank(True)) == signal.SIGTERM
    assert not (tmp_path / STOP_FILE).exists()
