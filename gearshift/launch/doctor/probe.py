"""`python -m gearshift.launch.doctor.probe`: what one host says of itself, over the standard input and output of ssh.

It answers one request a line, JSON after `MARK` (a login shell may print lines of its own), and ends with its input.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gearshift.launch import remote

MARK = "gearshift-probe "
CONNECT_SECONDS = 5.0
# Whatever becomes of the other end, no probe is left behind longer than this.
LONGEST_SECONDS = 600


def main() -> None:
    signal.alarm(LONGEST_SECONDS)
    listener = socket.create_server(("", 0))
    threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    answers: dict[str, Callable[[Any], Any]] = {
        "facts": lambda ask: facts(Path(ask["run_folder"]), ask["ranks"], ask["token"], listener.getsockname()[1]),
        "time": lambda ask: time.time(),
        "connect": lambda ask: connect_all(ask["to"]),
    }
    for line in sys.stdin:
        ask = json.loads(line)
        print(MARK + json.dumps(answers[ask["ask"]](ask)), flush=True)


def facts(run_folder: Path, ranks: int, token: str, port: int) -> dict[str, Any]:
    """`token`: a file that every host sees if they share the run folder; `port`: where this probe listens."""
    from gearshift.launch.devices import visible_gpus
    from gearshift.launch.doctor import machine, software

    gpus = len(visible_gpus())
    return {
        "versions": software.versions(),
        "gpus": gpus,
        "findings": [vars(found) for found in machine.findings(run_folder, ranks, bool(gpus))],
        "sees_token": Path(token).exists(),
        "interfaces": interfaces(),
        "address": address(),
        "port": port,
    }


def interfaces() -> dict[str, str]:
    """Name -> first IPv4 address, of those that have one."""
    import psutil  # DeepSpeed's own requirement

    found: dict[str, str] = {}
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family == socket.AF_INET:
                found.setdefault(name, one.address)
    return found


def address() -> str:
    """The one that DeepSpeed's launcher takes for the first host, or any that does not lead back here."""
    others = (found for found in interfaces().values() if not found.startswith("127."))
    return remote.address() or next(others, "127.0.0.1")


def connect_all(targets: list[list[Any]]) -> list[dict[str, Any]]:
    """`targets`: [address, port]. Of each: the own address that the connection went out from, or an error."""
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(lambda target: connect(target[0], target[1]), targets))


def connect(host: str, port: int) -> dict[str, Any]:
    try:
        with socket.create_connection((host, port), CONNECT_SECONDS) as connection:
            return {"from": connection.getsockname()[0]}
    except OSError as error:
        return {"error": error.strerror or str(error) or type(error).__name__}


def _accept(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        connection.close()


if __name__ == "__main__":
    main()
    os._exit(0)
