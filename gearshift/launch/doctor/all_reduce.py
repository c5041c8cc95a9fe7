"""A sum over all ranks, by processes that the real launcher starts: `python -m gearshift.launch.doctor.all_reduce`."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from gearshift.errors import Told, UserError
from gearshift.launch.doctor.findings import Finding, ok, wrong
from gearshift.launch.environment import adopt_launcher, prepare_environment
from gearshift.launch.launcher import start_here, start_on_hosts
from gearshift.launch.overrides import Arguments

MARK = "gearshift-all-reduce "
# Importing torch and DeepSpeed takes its time on a host that others use too.
SECONDS = 300
JOIN_SECONDS = 120
ELEMENTS = 1 << 20


def finding(arguments: Arguments, hosts: list[str], ranks: int, devices: list[int]) -> Finding:
    """Starts `ranks` processes as a run does, on `devices` or over `hosts`, and waits for their sum."""
    what, module = "all-reduce", "doctor.all_reduce"
    try:
        words, environment = (
            start_on_hosts(module, arguments, hosts) if hosts else start_here(module, arguments, ranks, devices)
        )
    except UserError as error:
        return wrong(what, "not started", str(error))
    code, out, err = _run(words, environment, SECONDS + 30.0)
    line = next((line.split(MARK, 1)[1] for line in out.splitlines() if MARK in line), None)
    if line is not None:
        return sum_finding(json.loads(line), ranks)
    print(err, end="", file=sys.stderr)
    late = code is None or code == 256 - signal.SIGALRM  # as DeepSpeed's launcher passes on a rank's signal
    ended = f"no sum after {SECONDS} s" if late else f"the processes ended with exit code {code}"
    return wrong(what, f"{ended}: {cause_in(err)}", "what they said is on standard error; NCCL_DEBUG=INFO tells more")


def sum_finding(found: dict[str, Any], ranks: int) -> Finding:
    """`found`: what rank 0 printed: "ranks", "backend", "sum", "seconds" (of the second sum)."""
    what = "all-reduce"
    told = f"{found['ranks']} ranks over {found['backend']}, 4 MB in {1e3 * found['seconds']:.1f} ms"
    if found["ranks"] != ranks:
        return wrong(what, told, f"{ranks} ranks were asked for")
    if found["sum"] != ranks * (ranks + 1) / 2:
        return wrong(what, f"{told}: the sum is {found['sum']:g}", f"it should be {ranks * (ranks + 1) / 2:g}")
    return ok(what, told)


def cause_in(text: str) -> str:
    """The line of what processes and launcher said that tells most: the first that names an error, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("pdsh@")]
    errors = (line for line in lines if re.search(r"\b\w*(Error|Exception): |^gearshift ", line))
    return next(errors, lines[-1] if lines else "nothing was said")


def _run(words: list[str], environment: dict[str, str], seconds: float) -> tuple[int | None, str, str]:
    """Exit code (None: it was ended after `seconds`), standard output, standard error."""
    process = subprocess.Popen(
        words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=seconds)
        return process.returncode, out, err
    except BaseException as error:  # also Ctrl-C: nothing is left behind
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return None, out, err


def main() -> None:
    """In each rank. It ends by itself, whatever becomes of the launcher."""
    signal.alarm(SECONDS)
    adopt_launcher(os.environ)
    prepare_environment()
    import torch
    import torch.distributed as dist

    from gearshift.engine.distributed import init_distributed, now
    from gearshift.engine.meeting import Card, meet
    from gearshift.launch.joining import name_interface

    try:
        met = meet(Card(socket.gethostname()), JOIN_SECONDS)
    except UserError as error:  # Told: another rank says it
        print("" if isinstance(error, Told) else f"gearshift doctor: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    name_interface()
    world = init_distributed(met.store)
    numbers = torch.full((ELEMENTS,), float(world.rank + 1), device=world.device)
    total = float(world.sum(numbers.clone())[-1])
    start = now(world.device)
    world.sum(numbers)
    seconds = now(world.device) - start
    if world.is_main:
        found = {"ranks": world.size, "backend": dist.get_backend(), "sum": total, "seconds": seconds}
        print(MARK + json.dumps(found), flush=True)
    time.sleep(0.1)  # the launcher's pipe is read before the process is gone
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
