"""SIGTERM and SIGUSR1 (what Slurm sends before it takes a job's machines away): noted, and acted on between steps.

A file in the run folder asks for the same: signals to the launcher do not reach the ranks of other hosts.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gearshift.engine import World

STOPPING = (signal.SIGTERM, signal.SIGUSR1)
STOP_FILE = "stop"


class StopSignals:
    """Notes the first such signal of this process. A SIGTERM after it ends it at once, as without this."""

    def __init__(self, run_folder: Path) -> None:
        self.noted = 0
        self._file = run_folder / STOP_FILE
        for number in STOPPING:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted and number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.noted = self.noted or number

    def on_any_rank(self, world: World) -> int:
        """The signal that any rank has noted, SIGTERM for the file, or 0. Collective."""
        if world.is_main and self._file.exists():
            self._file.unlink(missing_ok=True)  # or it would stop the run that goes on from here
            self.noted = self.noted or signal.SIGTERM
        return int(world.max(self.noted))

    def close(self) -> None:
        """The signals do what they do by themselves."""
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)
