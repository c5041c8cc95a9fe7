"""SIGTERM and SIGUSR1 (what Slurm sends before it takes a job's machines away): noted, and acted on between steps."""

from __future__ import annotations

import os
import signal
from types import FrameType

from gearshift.engine import World

STOPPING = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Notes the first such signal of this process. A second SIGTERM ends it at once, as without this."""

    def __init__(self) -> None:
        self.noted = 0
        for number in STOPPING:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted and number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.noted = self.noted or number

    def on_any_rank(self, world: World) -> int:
        """The signal that any rank has noted, or 0. Collective."""
        return int(world.max(self.noted))

    def close(self) -> None:
        """The signals do what they do by themselves."""
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)
