"""From the shell to the ranks and back: the launcher's command line, its processes' end, and what is said of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gearshift.errors import UserError
from gearshift.launch import devices, launcher
from gearshift.launch import environment as environment_of_ranks
from gearshift.launch.environment import adopt_launcher, prepare_environment
from gearshift.launch.overrides import Arguments, parse_arguments
from gearshift.launch.processes import free_port
from tests.engine.checkpoints.steps import write_step

from .conftest import example, write


def words_after_python(arguments: Arguments, ranks: int, gpus: list[int]) -> str:
    words = launcher.launch_command("ppo", arguments, ranks, gpus, port=1234)
    assert words[0] == sys.executable
    return " ".join(words[1:])


def test_command_on_cpu_gpus_and_hosts() -> None:
    start = "-m deepspeed.launcher.runner --log_level critical --hostfile"
    end = "--module gearshift.launch.ppo --config c.yaml"
    plain = parse_arguments(["c.yaml"])
    cpu = words_after_python(plain, 2, [])
    assert cpu == f"{start} /dev/null --num_accelerators 2 --master_port 1234 {end}"
    # CUDA_VISIBLE_DEVICES=4,6,7 and run.ranks: 2
    gpu = words_after_python(plain, 2, [4, 6, 7])
    assert gpu == f"{start} /dev/null --include localhost:4,6 --master_port 1234 {end}"


def test_command_over_hosts() -> None:
    typed = ["c.yaml", "--hostfile", "hosts", "--ppo.clip=-1", "--run.folder=--odd", "--launcher_args", "-f 3"]
    words = launcher.hosts_command("ppo", parse_arguments(typed), ["a", "b"], "10.0.0.1", 1234)
    parsed = runner().parse_args(words[3:])
    assert (parsed.hostfile, parsed.master_addr, parsed.master_port) == ("hosts", "10.0.0.1", 1234)
    assert (parsed.module, parsed.launcher_args, parsed.force_multi) == (True, "-f 3", False)
    assert [parsed.user_script, *parsed.user_args] == [
        *("gearshift.launch.ppo", "--config", "c.yaml", "--ppo.clip", "-1", "--run.folder=--odd")
    ]
    # The one host that is left may be another one than this.
    alone = launcher.hosts_command("ppo", parse_arguments(typed), ["b"], "10.0.0.2", 1234)
    assert runner().parse_args(alone[3:]).force_multi


@pytest.mark.parametrize("name", ["openmpi", "slurm"])
def test_launchers_that_start_the_ranks_themselves(name: str) -> None:
    """What DeepSpeed makes of it: the module is run as one, and rank 0's address goes along."""
    from deepspeed.launcher import multinode_runner

    typed = ["c.yaml", "--hostfile", "hosts", "--launcher", name, "--launcher_args", "--verbose"]
    with pytest.raises(UserError, match="--launcher_args=VALUE"):
        parse_arguments(typed)
    arguments = parse_arguments([*typed[:-2], "--launcher_args=--verbose"])
    words = launcher.hosts_command("ppo", arguments, ["a", "b"], "10.0.0.1", 1234)
    kind = {"openmpi": multinode_runner.OpenMPIRunner, "slurm": multinode_runner.SlurmRunner}[name]
    made = kind(runner().parse_args(words[3:]), "", {"a": 2, "b": 2})
    command = " ".join(made.get_cmd({}, {"a": [0, 1], "b": [0, 1]}))
    assert command.endswith(f"{sys.executable} -u -m gearshift.launch.ppo --config c.yaml")
    if name == "openmpi":
        assert "mpirun -n 4 -hostfile hosts" in command
        assert "--verbose -x MASTER_ADDR=10.0.0.1 -x MASTER_PORT=1234" in command
    else:
        assert command.startswith("srun -n 4 --verbose --export=ALL")


def runner() -> Any:
    return pytest.importorskip("deepspeed.launcher.runner")


def test_deepspeed_understands_the_command() -> None:
    arguments = parse_arguments(["c.yaml", "--ppo.clip", "-1"])
    for gpus in ([], [1, 3]):
        words = launcher.launch_command("ppo", arguments, 2, gpus, port=1234)
        parsed = runner().parse_args(words[3:])
        assert (parsed.module, parsed.user_script) == (True, "gearshift.launch.ppo")
        assert parsed.user_args == ["--config", "c.yaml", "--ppo.clip", "-1"]
        assert (parsed.num_gpus, parsed.include) == ((-1, "localhost:1,3") if gpus else (2, ""))


def test_the_config_is_checked_and_the_launcher_started(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(launcher, "run_to_end", lambda words, environment, job: started.append(words) or 0)
    config = write(example("ppo"))
    assert launcher.run_command("ppo", [config, "--run.ranks", "4"], lambda config: None) == 0
    assert "--num_accelerators 4" in " ".join(started[0])
    assert started[0][-4:] == ["--config", config, "--run.ranks", "4"]


@pytest.mark.parametrize(
    ("code", "says"),
    [(0, ""), (2, ""), (75, ""), (130, ""), (1, "exit code 1"), (247, "exit code 247 (SIGKILL: often out of memory)")],
)
def test_what_is_said_of_an_exit_code(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, says: str
) -> None:
    monkeypatch.setattr(launcher, "run_to_end", lambda words, environment, job: code)
    assert launcher.run_command("ppo", [write(example("ppo"))], lambda config: None) == code
    expected = f"gearshift ppo: the processes ended with {says}\n" if says else ""
    assert capsys.readouterr().err == expected


def started_by(
    here: Path, monkeypatch: pytest.MonkeyPatch, codes: list[int], *words: str, meanwhile: Any = None
) -> tuple[int, list[list[tuple[str, str]]]]:
    """The exit code of `gearshift ppo`, and the overrides of each start, where the processes end with `codes`."""
    starts: list[list[tuple[str, str]]] = []

    def run(command: str, arguments: Arguments, *more: Any) -> int:
        starts.append(arguments.overrides)
        if meanwhile is not None:
            meanwhile(len(starts))
        return codes[len(starts) - 1]

    monkeypatch.setattr(launcher, "_run_here", run)
    code = launcher.launch("ppo", parse_arguments([write(example("ppo")), *words]))
    return code, starts


@pytest.mark.parametrize("code", [0, 2, 75, *(128 + int(number) for number in (1, 2, 10, 15))])
def test_what_is_not_started_again(here: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A run that is done, mistaken or stopped from outside."""
    found, starts = started_by(here, monkeypatch, [code], "--max-restarts", "3")
    assert (found, len(starts)) == (code, 1)


def test_it_starts_again_from_its_own_checkpoints_alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--resume never with an earlier run's there: until it has saved itself, it starts as it was told to."""
    write_step(Path("runs/ppo/checkpoints"), 20)

    def saved(start: int) -> None:
        if start == 2:
            write_step(Path("runs/ppo/checkpoints"), 4)

    words = ("--resume", "never", "--max-restarts", "3")
    code, starts = started_by(here, monkeypatch, [137, 137, 0], *words, meanwhile=saved)
    assert code == 0
    assert [dict(start)["checkpoint.resume"] for start in starts] == ["never", "never", "auto"]


def test_a_file_that_asks_for_the_end(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an earlier run it is forgotten; left while the processes died, it keeps them from starting again."""
    stop = Path("runs/ppo/stop")
    stop.parent.mkdir(parents=True)
    stop.touch()
    code, starts = started_by(here, monkeypatch, [137, 0], "--max-restarts", "3")
    assert (code, len(starts)) == (0, 2)
    code, starts = started_by(here, monkeypatch, [137, 0], "--max-restarts", "3", meanwhile=lambda start: stop.touch())
    assert (code, len(starts)) == (137, 1)


def test_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_gpu_ids", lambda: ["GPU-aa", "GPU-ab", "GPU-b"])
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for variable, chosen in {"": [], "2,0": [2, 0], "GPU-b,1": [2, 1]}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
        assert devices.visible_gpus() == chosen
    for wrong in ("3", "GPU-a", "MIG-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", wrong)
        with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
            devices.visible_gpus()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert devices.visible_gpus() == [0, 1, 2]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert devices.visible_gpus() == []


def test_gpus_are_those_that_nvidia_smi_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "GPU 0: NVIDIA H200 (UUID: GPU-1)"\necho "  MIG 1g Device 0: (UUID: MIG-2)"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert devices._gpu_ids() == ["GPU-1"]


def test_more_ranks_than_gpus(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(launcher, "visible_gpus", lambda: [0])
    assert launcher.run_command("ppo", [write(example("ppo")), "--run.ranks", "2"], lambda config: None) == 2
    assert "run.ranks: 2, but 1 GPUs are visible" in capsys.readouterr().err


def test_environment_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    prepare_environment()
    assert (os.environ["LOCAL_SIZE"], os.environ["OMP_NUM_THREADS"]) == ("2", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--launcher", "pds"], "--launcher: pds is unknown here: use one of pdsh, openmpi, slurm"),
        (["--launcher", "slurm"], "--launcher slurm: sinfo is not installed here"),
        (["--launcher", "openmpi", "--include", "a"], "openmpi"),
    ],
)
def test_launchers_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], problem: str
) -> None:
    (tmp_path / "hosts").write_text("a slots=1\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=problem):
        launcher.chosen_hosts(parse_arguments(["c.yaml", "--hostfile", str(tmp_path / "hosts"), *words]))


def test_ranks_of_mpirun_and_srun() -> None:
    mpi = {"RANK": "3", "LOCAL_RANK": "1", "SIZE": "4", "LOCAL_SIZE": "2"}
    environment = {f"OMPI_COMM_WORLD_{name}": value for name, value in mpi.items()}
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        adopt_launcher(dict(environment))
    environment["MASTER_ADDR"] = "10.0.0.1"
    adopt_launcher(environment)
    assert ranks_in(environment) == ("3", "1", "4", "2", "10.0.0.1", "29500")
    slurm = {
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "11",
        "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
        "SLURM_STEP_NODELIST": "gpu[07-08,12]",
        "SLURM_JOB_ID": "20007",
    }
    adopt_launcher(slurm)
    assert ranks_in(slurm) == ("9", "1", "11", "3", "gpu07", "20007")
    # One task (gearshift starts the ranks itself), and torchrun in a task of its own on each host.
    for left_alone in ({**slurm, "SLURM_STEP_NUM_TASKS": "1"}, {**slurm, "RANK": "0"}):
        left_alone.pop("WORLD_SIZE")
        left_alone.pop("RANK") if left_alone["RANK"] == "9" else None
        before = dict(left_alone)
        adopt_launcher(left_alone)
        assert left_alone == before


@pytest.mark.parametrize(
    ("nodes", "first"), [("a", "a"), ("a,b", "a"), ("gpu[3,5]", "gpu3"), ("r[01-09]-x,b", "r01-x"), ("n7,n[8-9]", "n7")]
)
def test_first_node(nodes: str, first: str) -> None:
    assert environment_of_ranks._first_node(nodes) == first


def ranks_in(environment: dict[str, str]) -> tuple[str, ...]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return tuple(environment[name] for name in names)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_every_process(tmp_path: Path, number: signal.Signals) -> None:
    """The launcher's child (here a sleep that outlives its parent) is gone when `gearshift` is."""
    code = (
        "import os, sys; from gearshift.launch.processes import OneHost, run_to_end; "
        "sys.exit(run_to_end(sys.argv[1:], dict(os.environ), OneHost()))"
    )
    script = f"sleep 300 & echo $! > {tmp_path}/pid; wait"

    def listen() -> None:
        """A test run started in the background ignores Ctrl-C, and so would its children."""
        signal.signal(number, signal.SIG_DFL)

    with subprocess.Popen([sys.executable, "-c", code, "sh", "-c", script], preexec_fn=listen) as shell:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip() != "")
        child = int((tmp_path / "pid").read_text())
        assert alive(child)
        shell.send_signal(number)
        assert shell.wait(timeout=20) == 128 + number
    wait_until(lambda: not alive(child))


def alive(pid: int) -> bool:
    """Whether the process runs (one that has ended but was not yet collected does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(done: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def toy_config(seed: int) -> str:
    return write({**example("pretrain"), "run": {"folder": "runs/toy", "seed": seed}})


def test_the_rank_that_found_the_mistake_is_the_one_that_speaks(here: Path) -> None:
    """Two ranks under DeepSpeed's launcher: rank 0 sits in an all-reduce, which breaks when rank 1 ends."""
    words = launcher.launch_command("pretrain", Arguments(config=toy_config(1)), 2, [], free_port())
    words[words.index("gearshift.launch.pretrain")] = "tests.launch.toy_stage"
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr == "gearshift pretrain: rank 1 found an empty row\n"
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("seed", "said"),
    [(1, ["", "gearshift pretrain: rank 1 found an empty row\n"]), (3, ["gearshift pretrain: no row at all\n", ""])],
)
def test_nobody_speaks_after_the_first(here: Path, seed: int, said: list[str]) -> None:
    """The same two ranks, or a mistake that both find, and no launcher that would end whoever is left."""
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [sys.executable, "-m", "tests.launch.toy_stage", "--config", toy_config(seed)]
    ranks = [
        subprocess.Popen(
            [*words, f"--local_rank={rank}"],
            env={**environment, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    assert [rank.communicate(timeout=120)[1] for rank in ranks] == said
    assert [rank.returncode for rank in ranks] == [2, 2]


def test_a_crash_keeps_its_traceback(here: Path) -> None:
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(free_port())
    words = [sys.executable, "-m", "tests.launch.toy_stage", "--local_rank=0", "--config", toy_config(2)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("RuntimeError: a broken stage\n\n")
    assert done.returncode == 1
