"""Real gloo processes for tests: started once per test file, given functions to run on every rank."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from gearshift.launch.processes import free_port

# Ranks are forked from a server that has imported everything: a start then costs no seconds.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.preload"])

# Ranks import torch, transformers and deepspeed; on a machine that others use too that takes its time.
START_SECONDS = 600.0


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    """A rank: join the process group as under the launcher, then run what is sent until told to stop."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from gearshift.engine import init_distributed

    world = init_distributed()
    pipe.send((True, "ready"))
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send((True, function(world, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class WorkerGroup:
    """`size` processes of one world. `run(function, *args)` calls `function(world, *args)` on every rank."""

    def __init__(self, size: int):
        port = free_port()
        self._pipes: list[Connection] = []
        self._ready = False
        self._processes = []
        for rank in range(size):
            ours, theirs = processes.Pipe()
            # Not daemonic: a rank may start processes of its own (a compiler).
            process = processes.Process(target=_serve, args=(rank, size, port, theirs))
            process.start()
            theirs.close()  # the rank's alone: when it dies, ours ends
            self._pipes.append(ours)
            self._processes.append(process)
        atexit.register(self.stop)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
        """Results in rank order, within `timeout` seconds; the first rank's failure is raised with its stack trace."""
        if not self._ready:
            self._answers(START_SECONDS)
            self._ready = True
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._answers(timeout)

    def _answers(self, timeout: float) -> list[Any]:
        """Of all ranks, in whichever order they come: one that fails is told while the others wait for it."""
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        while len(results) < len(self._pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in results}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                self.stop()
                raise TimeoutError(f"ranks {sorted(waiting.values())} did not answer within {timeout} s")
            for pipe in ready:
                results[waiting[pipe]] = self._answer(waiting[pipe], pipe)
        return [results[rank] for rank in range(len(self._pipes))]

    def _answer(self, rank: int, pipe: Connection) -> Any:
        try:
            done, result = pipe.recv()
        except EOFError:
            done, result = False, "the process ended"
        if not done:
            self.stop()
            raise AssertionError(f"rank {rank}:\n{result}")
        return result

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
