"""A launcher as a child process: run to its end, and ended with everything that it has started here."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gearshift.errors import UserError

USER_ERROR = 2
PAUSED = 75  # EX_TEMPFAIL: a signal came, the run was saved, --resume auto goes on with it

# Where Linux takes ports from 32,768 on by itself, and Kubernetes from 30,000.
PORTS = range(20_000, 30_000)

# Signals that end a run.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class OneHost:
    """How a run on this host is stopped."""

    def ask_to_save(self, process: subprocess.Popen[bytes]) -> bool:
        """Asks the ranks that `process` has started to save and end; False where there are none yet."""
        ranks = ranks_of(process.pid)
        for rank in ranks:
            # Not to the whole group: DeepSpeed's launcher would give the ranks half a minute.
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGUSR1)
        return bool(ranks)

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Ends the run now."""
        end_group(process)

    def clean_up(self) -> None:
        """Ends what a launcher has left that ended by itself with an error."""


def run_to_end(words: list[str], environment: dict[str, str], job: OneHost) -> int:
    """Runs a command in a process group of its own, which ends with this process's own end. Returns its exit code."""
    process: subprocess.Popen[bytes] | None = None
    with _signals_raise():
        try:
            process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
            code = process.wait()
        except _Stopped as stopped:
            return _stop(process, stopped.signal, job) if process is not None else 128 + stopped.signal
    # A launcher that was itself killed may leave its ranks behind.
    if code < 0:
        end_group(process)
    if code:
        job.clean_up()
    return code % 256


def _stop(process: subprocess.Popen[bytes], number: int, job: OneHost) -> int:
    """Ends the run: saved first if SIGTERM or SIGUSR1 asks for it and its ranks can be asked; at once otherwise."""
    if number in (signal.SIGTERM, signal.SIGUSR1) and job.ask_to_save(process):
        with _signals_raise():
            try:
                code = process.wait()
                if code in (0, PAUSED, USER_ERROR):  # it had come to its own end meanwhile
                    return code
                job.clean_up()
                return 128 + number
            except _Stopped as again:
                number = again.signal
    job.end(process)
    return 128 + number


def ranks_of(launcher: int) -> list[int]:
    """The rank processes of this host that the launcher, which leads their session, has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if os.getsid(int(folder.name)) == launcher and any(w.startswith(b"--local_rank=") for w in words):
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


class _Stopped(Exception):
    def __init__(self, number: int):
        self.signal = number


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Ctrl-C, a closed terminal and `kill` become an exception in the main thread, once."""
    stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            raise _Stopped(number)

    # What is ignored stays ignored (nohup).
    before = {number: signal.signal(number, stop) for number in ENDING if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_group(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """Asks every process of the group to end, waits `patience` seconds, and kills what is left."""
    deadline = time.monotonic() + patience
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            while number == signal.SIGTERM and time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.1)
        except ProcessLookupError:
            break
    process.wait()


def free_port() -> int:
    """A TCP port of this host that nobody listens on now.

    Below those that the system gives by itself, where it can be: a rank listens on it seconds later.
    """
    for port in [*random.Random().sample(PORTS, 100), 0]:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise UserError("no TCP port of this host is free")
