"""Whether all hosts see the same run folder, before weights are loaded: every host writes its part of a checkpoint."""

from __future__ import annotations

import json
import os
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gearshift.errors import Told, UserError

# Seconds. A network file system may show a file to other hosts only when what they remember of the folder is old.
PATIENCE = 15.0


def require_shared(store: Any, folder: Path, rank: int, hosts: list[str], patience: float = PATIENCE) -> None:
    """Raises UserError on rank 0, and Told on the others, where a rank does not see what rank 0 writes to `folder`."""
    own = dist.PrefixStore("gearshift/run_folder", store)
    if rank == 0:
        mark = folder / f".seen-by-all-{uuid.uuid4().hex}"
        problem = _make(mark)
        own.set("mark", json.dumps({"mark": mark.name, "problem": problem}))
        if not problem:
            seen = [json.loads(_get(own, f"seen/{other}", patience)) for other in range(1, len(hosts))]
            with suppress(OSError):
                mark.unlink()
            problem = _blind(folder, hosts, [True, *seen])
        own.set("answer", problem)
        if problem:
            raise UserError(problem)
        return
    told = json.loads(_get(own, "mark", patience))
    if not told["problem"]:
        own.set(f"seen/{rank}", json.dumps(_appears(folder / told["mark"], patience)))
    if problem := _get(own, "answer", patience):
        raise Told(problem)


def _make(mark: Path) -> str:
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        return f"run.folder: {error.filename}: cannot be written: {error.strerror}"
    return ""


def _appears(mark: Path, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while not mark.exists():
        if time.monotonic() > deadline:
            return False
        for folder in (mark.parent.parent, mark.parent):
            with suppress(OSError):
                os.listdir(folder)  # a network file system then asks its server
        time.sleep(0.1)
    return True


def _get(store: Any, key: str, patience: float) -> str:
    # Twice: rank 0 waits for who waits for the file.
    try:
        store.wait([key], timedelta(seconds=2 * patience + 30))
        return str(store.get(key).decode())
    except RuntimeError:
        raise UserError("another rank has ended while all looked for run.folder") from None


def _blind(folder: Path, hosts: list[str], seen: list[bool]) -> str:
    blind = list(dict.fromkeys(host for host, sees in zip(hosts, seen, strict=True) if not sees))
    if not blind:
        return ""
    return (
        f"run.folder: {', '.join(blind)} {'does' if len(blind) == 1 else 'do'} not see {folder.absolute()} of "
        f"{hosts[0]}: every host writes its part of a checkpoint there: put it on a file system that they share, at "
        "the same path"
    )
