"""The processes of each way: started once, idle until it is their turn."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gearshift.launch.environment import search_path
from gearshift.launch.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "127.0.0.1"
EXTENSIONS = ROOT / "runs/benchmarks/torch_extensions"
TICKS = os.sysconf("SC_CLK_TCK")


class WorkerError(Exception):
    """A process ended without an answer; says what it last printed."""


@dataclass
class Turn:
    """One iteration of a way, by its slowest process."""

    seconds: dict[str, float]  # phase -> seconds
    peak_bytes: int  # of the process that has held most since it has loaded
    cpu_seconds: float  # of all its processes together: hardly longer where others have a part of the machine

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Way:
    """The processes of one way: each started with what a launcher would set, and a log of its own."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        processes: int,
        logs: Path,
        environment: Mapping[str, str] | None = None,
    ):
        self.name, self.port = name, free_port()
        self._logs = [logs / f"{name}-{rank}.log" for rank in range(processes)]
        self._processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **self._launched(command[0], rank, processes), **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log.open("w"),
                text=True,
            )
            for rank, log in enumerate(self._logs)
        ]

    def _launched(self, python: str, rank: int, size: int) -> dict[str, str]:
        # DeepSpeed compiles its collectives by the environment's own ninja.
        return {
            "PATH": search_path(python),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": ADDRESS,
            "MASTER_PORT": str(self.port),
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // size)),
            "DS_ACCELERATOR": "cpu",
            "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
            "TOKENIZERS_PARALLELISM": "false",
        }

    def loaded(self) -> list[dict[str, Any]]:
        """What each process says once its models are there. Raises WorkerError."""
        return self._answers()

    def turn(self) -> Turn:
        """One iteration. Raises WorkerError."""
        before = self.cpu_seconds()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = self._answers()
        slowest = max(answers, key=lambda answer: sum(answer["seconds"].values()))
        peak = max(answer["peak_bytes"] for answer in answers)
        return Turn(slowest["seconds"], peak, self.cpu_seconds() - before)

    def _answers(self) -> list[dict[str, Any]]:
        found = []
        for process, log in zip(self._processes, self._logs, strict=True):
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                told = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise WorkerError(f"{self.name}: a process ended; the last it printed:\n{told}")
            found.append(json.loads(line))
        return found

    def cpu_seconds(self) -> float:
        """Of all processes so far."""
        return sum(_cpu_seconds(process.pid) for process in self._processes)

    def stop(self) -> None:
        """Every process has ended when this is over, and what DeepSpeed leaves in shared memory is gone."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{ADDRESS}_{self.port}_*"):
            buffer.unlink(missing_ok=True)


def free_builds() -> None:
    """Where a build of DeepSpeed's collectives was killed, a start would wait for it for ever."""
    for lock in EXTENSIONS.glob("**/lock"):
        lock.unlink(missing_ok=True)


def machine_cpu_seconds() -> float:
    """Of every process on this machine since it was started."""
    user, nice, system, _, _, *interrupts = Path("/proc/stat").read_text().splitlines()[0].split()[1:8]
    return sum(map(int, (user, nice, system, *interrupts))) / TICKS


def _cpu_seconds(pid: int) -> float:
    """0 for a process that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS
