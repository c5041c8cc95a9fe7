"""What `gearshift` does on each host of a hostfile, sent there as text: the standard library alone, any Python 3.

`check PORT`: the address of this host, as `hostname -I` gives it first, and a port that is free: PORT, or with 0 any.
`end ADDRESS PORT`: ends every process of the run whose rank 0 listens there; prints how many there were.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress


def check(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the process group's store does
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError:
            print("in use")
            return
        free = probe.getsockname()[1]
    print(address() or "-", free)


def address() -> str:
    """What DeepSpeed's launcher takes for the first host's address; empty where `hostname -I` does not say."""
    try:
        told = subprocess.run(["hostname", "-I"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout
    except OSError:
        return ""
    return (told.decode().split() or [""])[0]


def of_the_run(address: str, port: int) -> "list[int]":
    """Ranks, by their environment, and the launcher that started them, by its words."""
    variables = {f"MASTER_ADDR={address}".encode(), f"MASTER_PORT={port}".encode()}
    options = {f"--master_addr={address}".encode(), f"--master_port={port}".encode()}
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and int(name) not in (os.getpid(), os.getppid()):
                with open(f"/proc/{name}/environ", "rb") as file:
                    environment = set(file.read().split(b"\0"))
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    words = set(file.read().split(b"\0"))
                if variables <= environment or options <= words:
                    found.append(int(name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def end(address: str, port: int) -> None:
    first = len(of_the_run(address, port))
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in of_the_run(address, port):
            with suppress(ProcessLookupError):
                os.kill(process, number)
        for _ in range(20):
            if not of_the_run(address, port):
                break
            time.sleep(0.1)
    print(first)


if __name__ == "__main__":
    if sys.argv[1] == "check":
        check(int(sys.argv[2]))
    else:
        end(sys.argv[2], int(sys.argv[3]))
