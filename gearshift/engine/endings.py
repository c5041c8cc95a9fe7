"""Over several hosts no launcher ends the others when a rank fails: the first to say why tells them through the store.

On one host DeepSpeed's launcher does that, within a second, and nothing here is needed.
"""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

FOLLOW_SECONDS = 2.0
_LOST = re.compile(r"connection|peer|gloo|nccl|broken pipe|timed out|timeout|socket", re.IGNORECASE)


def several_hosts() -> bool:
    """Whether the launcher has started ranks on more than this host."""
    return int(os.environ.get("WORLD_SIZE") or 1) > int(os.environ.get("LOCAL_SIZE") or 1)


def own_store(name: str) -> Any:
    """The process group's store by a connection of its own: the main thread may be waiting on that of torch."""
    store: Any = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore(f"gearshift/{name}", store.clone())


def may_speak(code: int) -> bool:
    """Whether this rank, which ends with `code`, is the first of all and so the one to say why.

    Not where the store is gone: rank 0, which keeps it, stays until the others know.
    """
    if not several_hosts() or not dist.is_initialized():
        return True
    own = f"{os.environ['RANK']} {code}"
    try:
        return bool(own_store("ending").compare_set("first", "", own).decode() == own)
    except RuntimeError:
        return False


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
    if several_hosts() and os.environ["RANK"] == "0":
        time.sleep(2 * FOLLOW_SECONDS + 1)


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
    return isinstance(error, RuntimeError | OSError) and bool(_LOST.search(str(error)))
