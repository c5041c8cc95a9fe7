"""A process that waits for its turn, does one iteration and tells what it took. The standard library alone: it
also runs in environments that have nothing of ours.

Commands come on stdin, one a line (`go`; the end of it ends the process); answers go to what stdout was, one JSON
object a line. Whatever else the process prints goes where its stderr goes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

PHASES = ("generation", "score", "train")


class Channel:
    """To be made before anything else prints."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def go(self) -> bool:
        """Blocks until there is a command; False: no more will come."""
        return sys.stdin.readline() == "go\n"

    def tell(self, answer: dict[str, Any]) -> None:
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()


class Clock:
    """Seconds of an iteration, phase by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = self._since = time.perf_counter()

    def ends(self, phase: str) -> None:
        """What has passed since the last phase ended was this one."""
        now = time.perf_counter()
        self.seconds[phase] = now - self._since
        self._since = now

    def total(self) -> float:
        return time.perf_counter() - self._start


def turns(channel: Channel) -> Iterator[Clock]:
    """A clock for each iteration, which is over when the next one is asked for. Comes back when no more will be."""
    loading = status_bytes("VmHWM")
    reset = reset_peak()
    channel.tell({"loading_peak_bytes": loading, "rss_bytes": status_bytes("VmRSS"), "peak_reset": reset})
    while channel.go():
        clock = Clock()
        yield clock
        channel.tell({"seconds": clock.seconds, "peak_bytes": status_bytes("VmHWM")})


def reset_peak() -> bool:
    """Whether VmHWM starts again from what is held now; not where the system does not allow it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def status_bytes(name: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")


def rank_and_size() -> tuple[int, int]:
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
