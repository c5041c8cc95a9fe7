"""Ranks that may die."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gearshift.errors import UserError
from gearshift.launch.processes import free_port
from tests.worker_group import processes

USER_ERROR, CRASH = 2, 1


def _rank(rank: int, size: int, port: int, log: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with (log / f"rank-{rank}.log").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from gearshift.engine import init_distributed

    code = 0
    try:
        function(init_distributed(), *args)
    except UserError as error:
        print(error, file=sys.stderr)
        code = USER_ERROR
    except BaseException:
        traceback.print_exc()
        code = CRASH
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_ranks(
    log: Path, function: Callable[..., Any], *args: Any, size: int = 2, alone: float = 0.2, timeout: float = 240.0
) -> list[int]:
    """Exit codes (minus the signal's number for a killed rank) of `function(world, *args)` on `size` ranks.

    As a launcher does, it ends the others `alone` seconds after one has failed. What ranks say is in `log`.
    """
    port = free_port()
    log.mkdir(parents=True, exist_ok=True)
    ranks = [processes.Process(target=_rank, args=(r, size, port, log, function, args)) for r in range(size)]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + timeout
    while any(rank.exitcode is None for rank in ranks):
        if any(rank.exitcode for rank in ranks):
            deadline = min(deadline, time.monotonic() + alone)
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        time.sleep(0.02)
    for rank in ranks:
        rank.join()
    return [int(rank.exitcode or 0) for rank in ranks]


def said(log: Path, rank: int) -> str:
    return (log / f"rank-{rank}.log").read_text()
