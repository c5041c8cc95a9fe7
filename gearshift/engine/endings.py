"""The first rank to fail says why, and tells the others through the store that it has.

On one host DeepSpeed's launcher then ends them, within a second or so; over several hosts they end themselves.
"""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

FOLLOW_SECONDS = 2.0
POLL_SECONDS = 0.25  # of a rank that is about to end
# Before it asks the store for the first time: where that is gone, something else is about to end this rank (a watchdog,
# a launcher), and torch would write pages of C++ frames meanwhile.
QUIET_SECONDS = 1.0
STORE_SECONDS = 5.0  # that a rank which ends waits for an answer of the store
_LOST = re.compile(r"connection|peer|gloo|nccl|broken pipe|timed out|timeout|socket", re.IGNORECASE)


def several_hosts() -> bool:
    """Whether the launcher has started ranks on more than this host."""
    return _ranks() > int(os.environ.get("LOCAL_SIZE") or 1)


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE") or 1)


def own_store(name: str) -> Any:
    """The process group's store by a connection of its own: the main thread may be waiting on that of torch."""
    store: Any = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore(f"gearshift/{name}", store.clone())


def code_before(code: int, wait: float = 0.0) -> int | None:
    """Waits so many seconds for another rank to say why the run ends; if none does, tells all that this one ends with
    `code`. None: it is to say why. Otherwise the code to end with in silence.

    Where the store is gone, so is rank 0, which keeps it and stays until the others know: over several hosts it has
    spoken, on one it may have been killed.
    """
    until, rank = time.monotonic() + wait, os.environ.get("RANK", "0")
    if not dist.is_initialized() or _ranks() == 1:
        time.sleep(wait)
        return None
    # Not a connection of its own, which takes minutes to find that there is nobody to connect to.
    store: Any = dist.PrefixStore("gearshift/ending", dist.distributed_c10d._get_default_store())
    own = f"{rank} {code}"
    time.sleep(min(wait, QUIET_SECONDS))
    try:
        store.set_timeout(timedelta(seconds=STORE_SECONDS))
        while time.monotonic() < until:
            if (first := code_of_the_first(store)) is not None:
                return first
            time.sleep(POLL_SECONDS)
        found = store.compare_set("first", "", own).decode()
    except RuntimeError:
        time.sleep(max(0.0, until - time.monotonic()))
        return code if several_hosts() and rank != "0" else None
    return None if found == own else int(found.split()[1])


def follow_the_first() -> None:
    """From now on this process ends, without a word, when another rank has said why the run ends."""
    store = own_store("ending")

    def follow() -> None:
        with suppress(
            RuntimeError
        ):  # the store is gone, and rank 0 with it: at the end of the run, or see the watchdog
            while (code := code_of_the_first(store)) is None:
                time.sleep(FOLLOW_SECONDS)
            os._exit(code)

    threading.Thread(target=follow, daemon=True).start()


def linger() -> None:
    """Rank 0 has said why the run ends, and keeps the store: the others must have seen that."""
    if os.environ["RANK"] == "0" and _ranks() > 1:
        time.sleep(2 * FOLLOW_SECONDS + 1 if several_hosts() else QUIET_SECONDS + 2.0)


def code_of_the_first(store: Any) -> int | None:
    """The exit code of the rank that said why the run ends, by `own_store("ending")`; None while all go on.

    The rank itself is not told: it is still speaking.
    """
    if not store.check(["first"]):
        return None
    rank, code = store.get("first").decode().split()
    return None if rank == os.environ["RANK"] else int(code)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exception is what a rank sees of another one's end."""
    words = isinstance(error, RuntimeError | OSError) and bool(_LOST.search(str(error)))
    return words or isinstance(error, ConnectionError)
