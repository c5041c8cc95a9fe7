"""The virtual environment that TRL's last PPOTrainer runs in: it asks for an older transformers than Gearshift."""

from __future__ import annotations

import shutil
import subprocess
import sys

from benchmarks.peers.processes import ROOT

TRL = ("trl==0.24.0", "transformers==4.57.1")
SHARED = ("torch", "accelerate", "deepspeed")  # in the versions of constraints.txt
FOLDER = ROOT / "runs/benchmarks/trl"
LIMIT = 1800  # seconds


class EnvironmentMissing(Exception):
    """It cannot be made; says why."""


def python() -> str:
    """Its interpreter; makes it where it is not there yet (minutes). Raises EnvironmentMissing."""
    interpreter, installed = FOLDER / "bin/python", FOLDER / "installed"
    requirements = [*TRL, *_pinned()]
    wanted = "\n".join(requirements)
    if installed.exists() and installed.read_text() == wanted:
        return str(interpreter)
    print(f"installing {', '.join(requirements)} in {FOLDER}, once", flush=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(FOLDER)])
    _run([str(interpreter), "-m", "pip", "install", "--quiet", *requirements])
    installed.write_text(wanted)
    return str(interpreter)


def _pinned() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for name in SHARED for line in lines if line.startswith(f"{name}==")]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        raise EnvironmentMissing(f"{' '.join(command[:4])} took longer than {LIMIT} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise EnvironmentMissing(f"{' '.join(command[:4])}: {lines[-1]}")
