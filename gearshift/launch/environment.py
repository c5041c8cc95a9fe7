"""Who this process is, by the variables of whichever launcher has started it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import MutableMapping
from pathlib import Path

from gearshift.errors import UserError


def adopt_launcher(environment: MutableMapping[str, str]) -> None:
    """Sets what DeepSpeed's launcher and torchrun set (`RANK` ...), where mpirun or srun has started this process.

    One process alone starts the others itself. Raises UserError where rank 0's address is not said.
    """
    if "RANK" in environment:
        return
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        for name, source in (("RANK", "RANK"), ("LOCAL_RANK", "LOCAL_RANK"), ("WORLD_SIZE", "SIZE")):
            environment[name] = environment[f"OMPI_COMM_WORLD_{source}"]
        environment["LOCAL_SIZE"] = environment["OMPI_COMM_WORLD_LOCAL_SIZE"]
        if "MASTER_ADDR" not in environment:
            raise UserError(
                "MASTER_ADDR is not set, and mpirun does not tell which host has rank 0: "
                "mpirun -x MASTER_ADDR=HOST, or MASTER_ADDR=HOST in .deepspeed_env"
            )
        environment.setdefault("MASTER_PORT", "29500")
    elif int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
        environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
        tasks = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
        environment["LOCAL_SIZE"] = str(tasks[int(environment["SLURM_NODEID"])])
        environment.setdefault("MASTER_ADDR", _first_node(environment["SLURM_STEP_NODELIST"]))
        # The same for all tasks, and seldom that of another job.
        environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))


def _tasks_per_node(text: str) -> list[int]:
    """`4(x2),3` -> [4, 4, 3]."""
    found: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        found += [int(tasks)] * int(times or 1)
    return found


def _first_node(nodes: str) -> str:
    """`gpu[07-09,12],login` -> gpu07."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise UserError(f"MASTER_ADDR is not set, and SLURM_STEP_NODELIST {nodes!r} does not tell the first host")
    return match[1] + (match[2] or "") + (match[3] or "")


def search_path(python: str = sys.executable) -> str:
    """PATH with the programs of the environment of this `python` in front, also when it is not activated."""
    own, path = str(Path(python).parent), os.environ.get("PATH", os.defpath)
    return path if path.split(os.pathsep)[0] == own else os.pathsep.join([own, path])


def prepare_environment() -> None:
    """Variables that must stand before torch is imported; those that are set already are left alone."""
    local_size = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    os.environ.setdefault("LOCAL_SIZE", str(local_size))
    # DeepSpeed's extensions are built by the environment's ninja.
    os.environ["PATH"] = search_path()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // local_size)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns and stops by itself after a fork
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # none: it tells of every start and end of a profile
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a host that cannot be reached is told in one line of ours
