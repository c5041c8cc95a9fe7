"""Ends a run whose ranks have stopped moving, and says which one stopped first and in what.

Every rank tells the process group's store every few seconds that it lives, and which phase it is in. Rank 0 reads what
all tell and gives the verdict; the others read the verdict, and look at rank 0 themselves. All of this is in threads
of its own: torch's collectives do not hold Python's lock while they wait.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch.distributed as dist

from gearshift.engine.distributed import World
from gearshift.engine.endings import own_store, several_hosts
from gearshift.engine.placement import named
from gearshift.errors import Paused

HUNG = 76  # exit code; EX_PROTOCOL of sysexits.h, which nothing else here uses


@dataclass
class _Seen:
    """What is known of a rank, and since when it is so (seconds of this process's clock)."""

    phase: str = "starting"
    process: str = ""  # host:pid
    place: str = ""  # the main thread's line of code
    beats: int = -1
    moves: int = -1
    beat_at: float = field(default_factory=time.monotonic)
    moved_at: float = field(default_factory=time.monotonic)

    def update(self, text: str) -> None:
        beats, moves, process, place, phase = text.split("|", 4)
        if int(beats) != self.beats:
            self.beats, self.beat_at = int(beats), time.monotonic()
        if int(moves) != self.moves:
            self.moves, self.moved_at = int(moves), time.monotonic()
        self.process, self.place, self.phase = process, place, phase

    @property
    def host(self) -> str:
        return self.process.partition(":")[0]


class Watchdog:
    """Watches this rank and, on rank 0, all of them; `seconds` without a sign of life or a change of phase is too long.

    `end(message)` is called in a thread of this rank when some rank has stopped; by default it prints and exits.
    """

    def __init__(self, world: World, seconds: float, end: Callable[[str], None] | None = None):
        self.world, self.seconds, self.interval = world, seconds, min(5.0, seconds / 10)
        self._end = end or self._exit
        self._store = own_store("alive")
        self._lost = False
        self._phases = ["between phases"]
        self._moves = self._beats = 0
        self._seen = {rank: _Seen() for rank in (range(world.size) if world.is_main else (0,))}
        self._turned = time.monotonic()
        self._closed, self._changed = threading.Event(), threading.Event()
        self._main = threading.current_thread().ident
        for work in (self._turn, self._look_after_turns):
            threading.Thread(target=self._repeat, args=(work,), daemon=True).start()

    def close(self) -> None:
        """No rank is watched any more. Collective: a rank that had closed before others would seem to have stopped."""
        dist.barrier()
        self.stop()

    def stop(self) -> None:
        """This rank tells nothing more."""
        self._closed.set()
        self._changed.set()

    def wait_for_verdict(self) -> None:
        """A connection broke, so some rank has ended: which one is found without waiting for `seconds`, and this
        process then ends. Returns when nothing is found."""
        self._lost = True
        self._closed.wait(6 * self.interval + 5)
        if self._closed.is_set():
            time.sleep(self.interval + 5)  # the thread that has the verdict ends the process

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What this rank is doing; a phase within another is told in its place."""
        self._phases.append(name)
        self._move()
        try:
            yield
        finally:
            self._phases.pop()
            self._move()

    def _move(self) -> None:
        self._moves += 1
        self._changed.set()

    def _repeat(self, work: Callable[[], None]) -> None:
        while not self._closed.is_set():
            self._changed.wait(self.interval)
            self._changed.clear()
            # A store that is gone is a process group that is gone: other ways of ending are under way.
            with suppress(RuntimeError):
                work()

    def _turn(self) -> None:
        self._beats += 1
        process = f"{socket.gethostname()}:{os.getpid()}"
        told = f"{self._beats}|{self._moves}|{process}|{self._place()}|{self._phases[-1]}"
        self._store.set(str(self.world.rank), told)
        for rank, seen in self._seen.items():
            if self._store.check([str(rank)]):
                seen.update(self._store.get(str(rank)).decode())
        verdict = self._verdict()
        if self.world.is_main and verdict:
            self._store.set("verdict", verdict)
        if not verdict and self._store.check(["verdict"]):
            verdict = self._store.get("verdict").decode()
        self._turned = time.monotonic()
        if verdict and not self._closed.is_set():
            self._closed.set()
            self._end(verdict)

    def _place(self) -> str:
        """`file.py:12 function` of the main thread."""
        frame = sys._current_frames().get(self._main or 0)
        if frame is None:
            return "?"
        return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}"

    def _look_after_turns(self) -> None:
        """Rank 0 keeps the store: when it has stopped, a turn does not come back."""
        patience = min(self.seconds, 4 * self.interval) if self._lost else self.seconds
        if not self.world.is_main and time.monotonic() - self._turned > patience and not self._closed.is_set():
            self._closed.set()
            self._end(self._stopped(0, patience))

    def _verdict(self) -> str:
        """What to say of the rank to blame, or nothing."""
        now = time.monotonic()
        hung = self.world.is_main and all(now - seen.moved_at > self.seconds for seen in self._seen.values())
        # Where none comes further, a rank that has missed a few signs of life is the one that they wait for.
        silent = min(3 * self.interval, self.seconds) if hung or self._lost else self.seconds
        for rank, seen in self._seen.items():
            if now - seen.beat_at > silent:
                return self._stopped(rank, silent if self._lost else self.seconds)
        if hung:
            # Most wait for the others; which does not, its line of code tells. Nothing need be killed: all read this.
            least = sorted(self._seen, key=lambda rank: self._seen[rank].moves)[:8]
            each = ", ".join(
                f"{self._named(rank)} hangs in {self._seen[rank].phase} ({self._seen[rank].place})" for rank in least
            )
            return f"-||no rank has come further for {self.seconds:g} s: {each}"
        return ""

    def _named(self, rank: int) -> str:
        """`rank 3`; over several hosts also where it is."""
        host = self._seen[rank].host
        return f"rank {rank} on {host}" if host and several_hosts() else f"rank {rank}"

    def _stopped(self, rank: int, seconds: float) -> str:
        """The verdict on a rank that has not been heard of for `seconds`, or on its whole host."""
        seen, now = self._seen[rank], time.monotonic()
        neighbours = [r for r, other in self._seen.items() if other.host == seen.host]
        # They tell of themselves in turns.
        quiet = all(now - self._seen[r].beat_at > seconds - 2 * self.interval for r in neighbours)
        who = f"{self._named(rank)} has stopped"
        if self.world.is_main and seen.host and len(neighbours) > 1 and quiet and several_hosts():
            who = f"host {seen.host} ({named(neighbours)}) has stopped or is cut off"
        return f"{rank}|{seen.process}|{who} in {seen.phase}: no sign of it for {seconds:g} s"

    def _exit(self, verdict: str) -> None:
        rank, process, told = verdict.split("|", 2)
        host, _, pid = process.partition(":")
        # The first of those that live; without rank 0 and its store, the first of each other host.
        speaks = self.world.rank == (1 if rank == "0" else 0)
        if speaks or (rank == "0" and self.world.local_rank == 0 and host != socket.gethostname()):
            print(f"{told}; the run ends here", file=sys.stderr, flush=True)
        if self.world.is_main:
            time.sleep(min(2 * self.interval, 2.0))  # the store is this rank's: the others must have read it
        if pid and host == socket.gethostname():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(int(pid), signal.SIGKILL)  # a stopped process would not even notice a request
        os._exit(HUNG)


_current: Watchdog | None = None


@contextmanager
def watching(world: World, seconds: float) -> Iterator[None]:
    """A watchdog for the time of a run; none with 0 seconds or where this rank is alone. Collective."""
    global _current
    if seconds == 0 or world.size == 1:
        yield
        return
    _current = Watchdog(world, seconds)
    goes_on = False
    try:
        yield
        _current.close()
    except Exception as error:
        goes_on = several_hosts() and not isinstance(error, Paused)  # for `wait_for_verdict`
        raise
    finally:
        if not goes_on:
            _current.stop()
            _current = None


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What this rank is doing, for the watchdog to tell, where there is one."""
    if _current is None:
        yield
        return
    with _current.phase(name):
        yield


def wait_for_verdict() -> None:
    """Where a connection broke in a run that is watched over several hosts, ends this process with the one to blame."""
    if _current is not None:
        _current.wait_for_verdict()
