"""A stage's way from the command line to its processes.

`run_command` is the whole of `gearshift ppo` and of `gearshift.launch.ppo`: typed at a shell it checks the config and
starts DeepSpeed's launcher; started by that launcher (or torchrun) it runs the stage in this process.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from gearshift.engine.checkpoints.reading import steps
from gearshift.engine.checkpoints.settings import FOLDER
from gearshift.errors import Paused, UserError
from gearshift.launch.overrides import Arguments, parse_arguments

# Seconds. DeepSpeed's launcher looks once a second for a process that failed, and then ends the others.
LAUNCHER_POLL = 1.0
USER_ERROR, CRASH = 2, 1
PAUSED = 75  # EX_TEMPFAIL: a signal came, the run was saved, --resume auto goes on with it


def run_command(command: str, argv: Sequence[str] | None, stage: Callable[[Any], None]) -> int:
    """Runs `gearshift COMMAND argv`; `stage(config)` does the work in each process. Returns the exit code."""
    try:
        arguments = parse_arguments(list(sys.argv[1:] if argv is None else argv))
        if arguments.help:
            from gearshift.launch.config import help_text

            print(help_text(command))
            return 0
        if arguments.config is None:
            raise UserError(f"a config file is missing: gearshift {command} CONFIG.yaml")
        if not under_launcher():
            return launch(command, arguments)
    except UserError as error:
        # Under a launcher every process sees a mistake in the command line; one of them is enough to tell.
        if os.environ.get("RANK", "0") == "0":
            print(f"gearshift {command}: {error}", file=sys.stderr)
        return USER_ERROR
    return _work(command, arguments, stage)


def under_launcher() -> bool:
    """Whether a distributed launcher started this process."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


# --- in a rank -------------------------------------------------------------------------------------------------------


def _work(command: str, arguments: Arguments, stage: Callable[[Any], None]) -> NoReturn:
    """Runs the stage in this rank, which ends here; the rank that failed first is the only one that speaks."""
    from gearshift.launch.config import load

    prepare_environment()
    # DeepSpeed calls collectives by names that torch is renaming: nothing that a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    rank = int(os.environ["RANK"])
    try:
        assert arguments.config is not None
        stage(load(command, arguments.config, arguments.overrides, ranks=int(os.environ["WORLD_SIZE"])))
    except UserError as error:
        # An error of all ranks is told by rank 0; the launcher ends the others before they come to it.
        _fail(f"gearshift {command}: {error}", USER_ERROR, wait=0 if rank == 0 else 3 * LAUNCHER_POLL)
    except Paused as paused:
        _fail(f"gearshift {command}: {paused}" if rank == 0 else "", PAUSED, wait=0)
    except KeyboardInterrupt:
        _fail("", 128 + signal.SIGINT, wait=0)
    except Exception:
        # Often only "connection closed by peer", because another rank has failed: wait for that one to be found.
        _fail(traceback.format_exc(), CRASH, wait=(3 if rank == 0 else 6) * LAUNCHER_POLL)
    _leave(0)


def _fail(message: str, code: int, wait: float) -> NoReturn:
    # Who waits here is ended by the launcher's SIGTERM; the run's own handler would only note it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(wait)
    if message:
        print(message, file=sys.stderr)
    _leave(code)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: tearing down a process group whose peers are busy can hang, and threads of gloo that are still there
    # at the interpreter's end have been seen to abort a run that was complete.
    os._exit(code)


def prepare_environment() -> None:
    """Variables that must stand before torch is imported; those that are set already are left alone."""
    local_size = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    os.environ.setdefault("LOCAL_SIZE", str(local_size))  # DeepSpeed's shared-memory collectives need it
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // local_size)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns and stops by itself after a fork


# --- at the shell ----------------------------------------------------------------------------------------------------


def launch(command: str, arguments: Arguments) -> int:
    """Checks the config, starts DeepSpeed's launcher, waits, and returns the exit code. Raises UserError."""
    from gearshift.launch.config import load

    assert arguments.config is not None
    config = load(command, arguments.config, arguments.overrides)
    devices = [] if arguments.hostfile else visible_gpus()
    ranks = hostfile_ranks(arguments.hostfile) if arguments.hostfile else config.run.ranks or len(devices) or 2
    if devices and ranks > len(devices):
        raise UserError(
            f"{arguments.config}: run.ranks: {ranks}, but {len(devices)} GPUs are visible: use that or fewer"
        )
    load(command, arguments.config, arguments.overrides, ranks=ranks)
    environment = dict(os.environ)
    if devices:
        # The launcher is told by --include which GPUs; with both it drops the variable and says so.
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    elif not arguments.hostfile and not Path("/dev/kfd").exists():
        # Said outright, DeepSpeed does not warn in every process that it found nothing better (or take up a Mac's GPU).
        environment.setdefault("DS_ACCELERATOR", "cpu")
    for left in range(arguments.max_restarts, -1, -1):
        code = run_to_end(launch_command(command, arguments, ranks, devices, free_port()), environment)
        if code in (0, USER_ERROR, PAUSED, 128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP):
            return code
        print(f"gearshift {command}: the processes ended with {_meaning(code)}", file=sys.stderr)
        if left:
            arguments = _again(arguments, Path(config.run.folder))
            print(f"gearshift {command}: starting again, {left - 1} more times at most", file=sys.stderr)
    return code


def _again(arguments: Arguments, run_folder: Path) -> Arguments:
    """The same, from the newest checkpoint; from the start while there is none."""
    if not steps(run_folder / FOLDER):
        return arguments
    rest = [(key, value) for key, value in arguments.overrides if key != "checkpoint.resume"]
    return dataclasses.replace(arguments, overrides=[*rest, ("checkpoint.resume", "auto")])


def launch_command(command: str, arguments: Arguments, ranks: int, devices: list[int], port: int) -> list[str]:
    """`deepspeed ... --module gearshift.launch.COMMAND --config ...`, by this interpreter.

    On one host: `ranks` processes, on the first `ranks` of `devices` (indices of visible GPUs; none: on the CPU).
    """
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"]
    if arguments.hostfile:
        words += ["--hostfile", arguments.hostfile]
    else:
        where = ["--include", f"localhost:{','.join(map(str, devices[:ranks]))}"] if devices else []
        # No file: the launcher would otherwise look for /job/hostfile.
        words += ["--hostfile", os.devnull, *(where or ["--num_accelerators", str(ranks)]), "--master_port", str(port)]
    words += ["--module", f"gearshift.launch.{command}", "--config", str(arguments.config)]
    for key, value in arguments.overrides:
        # Apart, since the launcher quotes only words that do not start with a dash when it goes to other hosts.
        words += [f"--{key}={value}"] if value.startswith("--") else [f"--{key}", value]
    return words


def run_to_end(words: list[str], environment: dict[str, str]) -> int:
    """Runs a command in a process group of its own, which ends with this process's own end. Returns its exit code."""
    process: subprocess.Popen[bytes] | None = None
    with _signals_raise():
        try:
            process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
            code = process.wait()
        except _Stopped as stopped:
            return _stop(process, stopped.signal) if process is not None else 128 + stopped.signal
    # A launcher that was itself killed may leave its ranks behind.
    if code < 0:
        _end_group(process)
    return code % 256


def _stop(process: subprocess.Popen[bytes], number: int) -> int:
    """Ends the run: saved first if SIGTERM or SIGUSR1 asks for it and its ranks are here; at once at another signal."""
    ranks = _ranks_of(process.pid) if number in (signal.SIGTERM, signal.SIGUSR1) else []
    if not ranks:
        _end_group(process)
        return 128 + number
    for rank in ranks:
        # Not to the whole group: DeepSpeed's launcher would give the ranks half a minute.
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGUSR1)
    with _signals_raise():
        try:
            return PAUSED if process.wait() == PAUSED else 128 + number
        except _Stopped as again:
            number = again.signal
    _end_group(process)
    return 128 + number


def _ranks_of(launcher: int) -> list[int]:
    """The rank processes of this host that the launcher, which leads their session, has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if os.getsid(int(folder.name)) == launcher and any(w.startswith(b"--local_rank=") for w in words):
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


class _Stopped(Exception):
    def __init__(self, number: int):
        self.signal = number


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Ctrl-C, a closed terminal and `kill` become an exception in the main thread, once."""
    stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            raise _Stopped(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    # What is ignored stays ignored (nohup).
    before = {number: signal.signal(number, stop) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_group(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """Asks every process of the group to end, waits `patience` seconds, and kills what is left."""
    deadline = time.monotonic() + patience
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            while number == signal.SIGTERM and time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.1)
        except ProcessLookupError:
            break
    process.wait()


def _meaning(code: int) -> str:
    if code > 192:  # DeepSpeed's launcher passes on -signal, which a shell sees as 256 - signal
        number = 256 - code
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return f"exit code {code} ({name}{': often out of memory' if number == signal.SIGKILL else ''})"
    return f"exit code {code}"


def visible_gpus() -> list[int]:
    """Indices of the GPUs that this process may use, without importing torch (which takes seconds)."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    found = _gpu_ids()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not found:
        return list(range(len(found)))
    devices = []
    for word in filter(None, (w.strip() for w in chosen.split(","))):
        matches = [int(word)] if word.isdigit() else [n for n, uuid in enumerate(found) if uuid.startswith(word)]
        if len(matches) != 1 or matches[0] >= len(found):
            raise UserError(
                f"CUDA_VISIBLE_DEVICES: {word} is not one of the {len(found)} GPUs: use 0 to {len(found) - 1}"
            )
        devices += matches
    return devices


def _gpu_ids() -> list[str]:
    """The UUID of each GPU, by nvidia-smi; by the device files where that is missing (the UUIDs are then empty)."""
    if shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        if listing.returncode == 0:
            return re.findall(r"^GPU \d+:.*\(UUID: ([^)]+)\)", listing.stdout, re.MULTILINE)
    return ["" for _ in Path("/dev").glob("nvidia[0-9]*")]


def hostfile_ranks(path: str) -> int:
    """Processes that a hostfile (`host slots=N` a line) asks for. Raises UserError naming file and line."""
    if not Path(path).is_file():
        raise UserError(f"--hostfile: there is no file {path} (relative to {Path.cwd()})")
    ranks = 0
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        line = line.split("#")[0].strip()
        match = re.match(r"^\S+\s+slots=(\d+)$", line)
        if line and not match:
            raise UserError(f"{path}:{number}: should read HOST slots=N, not {line!r}")
        ranks += int(match[1]) if match else 0
    if not ranks:
        raise UserError(f"{path}: names no host: lines should read HOST slots=N")
    return ranks


def free_port() -> int:
    """A TCP port of this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
