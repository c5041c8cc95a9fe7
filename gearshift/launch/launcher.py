"""A stage's way from the command line to its processes.

`run_command` is the whole of `gearshift ppo` and of `gearshift.launch.ppo`: typed at a shell it checks the config and
starts DeepSpeed's launcher; started by that launcher (or torchrun, mpirun, srun) it runs the stage in this process.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gearshift.engine.checkpoints.reading import POINTER, steps
from gearshift.engine.checkpoints.settings import FOLDER
from gearshift.errors import UserError
from gearshift.launch.devices import visible_gpus
from gearshift.launch.environment import adopt_launcher
from gearshift.launch.hostfile import read_hostfile, selected
from gearshift.launch.overrides import RESUME, Arguments, Short, parse_arguments
from gearshift.launch.processes import ENDING, PAUSED, USER_ERROR, OneHost, free_port, run_to_end
from gearshift.launch.rank import run_rank
from gearshift.rlhf.settings import Config
from gearshift.rlhf.signals import STOP_FILE

# The programs by which a launcher is known to be there.
PROGRAMS = {"pdsh": ("pdsh", "ssh"), "openmpi": ("ompi_info", "ssh"), "slurm": ("sinfo",)}


def run_command(
    command: str,
    argv: Sequence[str] | None,
    stage: Callable[[Any], None],
    *,
    short: Short = RESUME,
    default_config: Path | None = None,
) -> int:
    """Runs `gearshift COMMAND argv`; `stage(config)` does the work in each process. Returns the exit code.

    `short`: options that stand for settings; `default_config`: the config file where none is named.
    """
    try:
        arguments = parse_arguments(list(sys.argv[1:] if argv is None else argv), short)
        if arguments.help:
            from gearshift.launch.config import help_text

            print(help_text(command))
            return 0
        if arguments.config is None and default_config is not None:
            arguments.config = str(default_config)
        if arguments.config is None:
            raise UserError(f"a config file is missing: gearshift {command} CONFIG.yaml")
        adopt_launcher(os.environ)
        if not under_launcher():
            return launch(command, arguments)
    except UserError as error:
        # Under a launcher every process sees a mistake in the command line; one of them is enough to tell.
        if os.environ.get("RANK", "0") == "0":
            print(f"gearshift {command}: {error}", file=sys.stderr)
        return USER_ERROR
    return run_rank(command, arguments, stage)


def under_launcher() -> bool:
    """Whether a distributed launcher started this process."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def launch(command: str, arguments: Arguments) -> int:
    """Checks the config, starts DeepSpeed's launcher, waits, and returns the exit code. Raises UserError."""
    from gearshift.launch.config import load

    assert arguments.config is not None
    config = load(command, arguments.config, arguments.overrides)
    if arguments.hostfile:
        hosts = chosen_hosts(arguments)
        load(command, arguments.config, arguments.overrides, ranks=sum(map(len, hosts.values())))
        check_hosts(config, hosts)
    else:
        devices = visible_gpus()
        ranks = _ranks_here(arguments, config, devices)
        load(command, arguments.config, arguments.overrides, ranks=ranks)
    folder = Path(config.run.folder)
    if config.saves:
        (folder / STOP_FILE).unlink(missing_ok=True)  # of an earlier run
    before = _checkpoints_in(folder)
    for left in range(arguments.max_restarts, -1, -1):
        if arguments.hostfile:
            code = _run_on_hosts(command, arguments, config, list(hosts))
        else:
            code = _run_here(command, arguments, ranks, devices)
        if code in (0, USER_ERROR, PAUSED, *(128 + number for number in ENDING)):
            return code
        print(f"gearshift {command}: the processes ended with {_meaning(code)}", file=sys.stderr)
        if left and (folder / STOP_FILE).exists():
            print(f"gearshift {command}: {folder / STOP_FILE} is there: not starting again", file=sys.stderr)
            return code
        if left:
            arguments = _again(arguments, folder, before)
            print(f"gearshift {command}: starting again, {left - 1} more times at most", file=sys.stderr)
    return code


def _checkpoints_in(run_folder: Path) -> tuple[list[int], int]:
    """The steps that are there, and when the pointer was last moved."""
    pointer = run_folder / FOLDER / POINTER
    return steps(run_folder / FOLDER), pointer.stat().st_mtime_ns if pointer.exists() else 0


def _again(arguments: Arguments, run_folder: Path, before: tuple[list[int], int]) -> Arguments:
    """The same, from the newest checkpoint; as it was started while it has none of its own beside those of `before`."""
    now = _checkpoints_in(run_folder)
    if now == before or not now[0]:
        return arguments
    rest = [(key, value) for key, value in arguments.overrides if key != "checkpoint.resume"]
    return dataclasses.replace(arguments, overrides=[*rest, ("checkpoint.resume", "auto")])


# --- on this host ----------------------------------------------------------------------------------------------------


def _ranks_here(arguments: Arguments, config: Config, devices: list[int]) -> int:
    ranks = config.run.ranks or len(devices) or 2
    if devices and ranks > len(devices):
        raise UserError(
            f"{arguments.config}: run.ranks: {ranks}, but {len(devices)} GPUs are visible: use that or fewer"
        )
    return ranks


def _run_here(command: str, arguments: Arguments, ranks: int, devices: list[int]) -> int:
    return run_to_end(*start_here(command, arguments, ranks, devices), OneHost())


def start_here(command: str, arguments: Arguments, ranks: int, devices: list[int]) -> tuple[list[str], dict[str, str]]:
    """The `launch_command` and its environment."""
    environment = dict(os.environ)
    if devices:
        # The launcher is told by --include which GPUs; with both it drops the variable and says so.
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    elif not Path("/dev/kfd").exists():
        # Said outright, DeepSpeed does not warn in every process that it found nothing better (or take up a Mac's GPU).
        environment.setdefault("DS_ACCELERATOR", "cpu")
    port = int(arguments.launcher.get("master_port", 0)) or free_port()
    return launch_command(command, arguments, ranks, devices, port), environment


def launch_command(command: str, arguments: Arguments, ranks: int, devices: list[int], port: int) -> list[str]:
    """`deepspeed ... --module gearshift.launch.COMMAND --config ...`, by this interpreter: `ranks` processes, on the
    first `ranks` of `devices` (indices of visible GPUs; none: on the CPU)."""
    where = ["--include", f"localhost:{','.join(map(str, devices[:ranks]))}"] if devices else []
    # No file: the launcher would otherwise look for /job/hostfile.
    words = ["--hostfile", os.devnull, *(where or ["--num_accelerators", str(ranks)]), "--master_port", str(port)]
    return [*_RUNNER, *words, "--module", f"gearshift.launch.{command}", *_stage_words(arguments)]


_RUNNER = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"]


def _stage_words(arguments: Arguments) -> list[str]:
    words = ["--config", str(arguments.config)]
    for key, value in arguments.overrides:
        # Apart, since the launcher quotes only words that do not start with a dash when it goes to other hosts.
        words += [f"--{key}={value}"] if value.startswith("--") else [f"--{key}", value]
    return words


# --- over several hosts ----------------------------------------------------------------------------------------------


def chosen_hosts(arguments: Arguments) -> dict[str, list[int]]:
    """The hosts of the hostfile that run ranks, and the slots of each. Raises UserError."""
    assert arguments.hostfile is not None
    options, launcher = arguments.launcher, _launcher(arguments)
    if launcher not in PROGRAMS:
        raise UserError(f"--launcher: {launcher} is unknown here: use one of {', '.join(PROGRAMS)}")
    for name in ("include", "exclude"):
        if launcher == "openmpi" and name in options:
            raise UserError(f"--{name}: DeepSpeed's openmpi launcher knows none: leave those hosts out of the hostfile")
    hosts = read_hostfile(arguments.hostfile)
    for program in PROGRAMS[launcher]:
        if shutil.which(program) is None:
            raise UserError(f"--launcher {launcher}: {program} is not installed here: install it or name another")
    return selected(hosts, options.get("include", ""), options.get("exclude", ""))


def check_hosts(config: Config, hosts: Mapping[str, Sequence[int]]) -> None:
    """Raises UserError when tensor-parallel groups do not fit the hosts."""
    from gearshift.launch.world_table import check_tensor_parallel

    if hasattr(config, "rollout"):
        check_tensor_parallel(config.rollout.tp_size, {host: len(slots) for host, slots in hosts.items()})


def _run_on_hosts(command: str, arguments: Arguments, config: Config, names: list[str]) -> int:
    from gearshift.launch.hosts import SeveralHosts

    words, environment = start_on_hosts(command, arguments, names)
    job = SeveralHosts(
        run_folder=Path(config.run.folder),
        saves=config.saves,
        hosts=names,
        ssh_port=arguments.launcher.get("ssh_port"),
        address=environment["MASTER_ADDR"],
        port=int(environment["MASTER_PORT"]),
        by_ssh=_launcher(arguments) == "pdsh",
    )
    if job.by_ssh and config.run.hang_seconds:
        # Without this nobody here would ever hear that a host is cut off.
        alive = f"-o ServerAliveInterval={max(1, round(config.run.hang_seconds / 3))} -o ServerAliveCountMax=3"
        environment["PDSH_SSH_ARGS_APPEND"] = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {alive}".strip()
    return run_to_end(words, environment, job)


def start_on_hosts(command: str, arguments: Arguments, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The `hosts_command` and its environment, with rank 0's address and port. Raises UserError (`first_address`)."""
    from gearshift.launch.hosts import first_address

    options = arguments.launcher
    address, port = names[0], int(options.get("master_port", 0)) or 29500
    if _launcher(arguments) != "slurm":  # whose hosts need not let anybody in
        address, port = first_address(names, options.get("ssh_port"), int(options.get("master_port", 0)))
    address = options.get("master_addr", address)
    environment = {**os.environ, "MASTER_ADDR": address, "MASTER_PORT": str(port)}  # which srun hands on
    return hosts_command(command, arguments, names, address, port), environment


def _launcher(arguments: Arguments) -> str:
    """DeepSpeed's name, in small letters, of what starts the ranks of other hosts."""
    return arguments.launcher.get("launcher", "pdsh").lower()


def hosts_command(command: str, arguments: Arguments, names: Sequence[str], address: str, port: int) -> list[str]:
    """`deepspeed --hostfile ... --module gearshift.launch.COMMAND --config ...` for the hosts `names`."""
    launcher = _launcher(arguments)
    options = {**arguments.launcher, "master_addr": address, "master_port": str(port)}
    if launcher == "openmpi":  # whose ranks are told by nobody else
        told = shlex.join(["-x", f"MASTER_ADDR={address}", "-x", f"MASTER_PORT={port}"])
        options["launcher_args"] = f"{options.get('launcher_args', '')} {told}".strip()
    words = ["--hostfile", str(arguments.hostfile), *(f"--{name}={value}" for name, value in options.items())]
    if len(names) == 1:
        words.append("--force_multi")  # it may not be this host
    # For Slurm DeepSpeed forgets --module, so the word goes to Python itself; and its hosts need not let anybody in.
    module = ["--no_ssh_check", "--", "-m"] if launcher == "slurm" else ["--module"]
    return [*_RUNNER, *words, *module, f"gearshift.launch.{command}", *_stage_words(arguments)]


def _meaning(code: int) -> str:
    if code == 255:
        return f"exit code {code} (ssh: the connection to a host broke)"
    if code > 192:  # DeepSpeed's launcher passes on -signal, which a shell sees as 256 - signal
        number = 256 - code
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return f"exit code {code} ({name}{': often out of memory' if number == signal.SIGKILL else ''})"
    return f"exit code {code}"
