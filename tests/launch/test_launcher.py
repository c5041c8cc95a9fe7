"""From the shell to the ranks and back: the launcher's command line, its processes' end, and what is said of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gearshift.errors import UserError
from gearshift.launch import launcher
from gearshift.launch.overrides import Arguments, parse_arguments

from .conftest import example, write


def words_after_python(arguments: Arguments, ranks: int, devices: list[int]) -> str:
    words = launcher.launch_command("ppo", arguments, ranks, devices, port=1234)
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
    hosts = parse_arguments(["c.yaml", "--hostfile", "hosts", "--ppo.clip=-1", "--run.folder=--odd"])
    assert words_after_python(hosts, 16, []) == f"{start} hosts {end} --ppo.clip -1 --run.folder=--odd"


def test_deepspeed_understands_the_command() -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    arguments = parse_arguments(["c.yaml", "--ppo.clip", "-1"])
    for devices in ([], [1, 3]):
        words = launcher.launch_command("ppo", arguments, 2, devices, port=1234)
        parsed = runner.parse_args(words[3:])
        assert (parsed.module, parsed.user_script) == (True, "gearshift.launch.ppo")
        assert parsed.user_args == ["--config", "c.yaml", "--ppo.clip", "-1"]
        assert (parsed.num_gpus, parsed.include) == ((-1, "localhost:1,3") if devices else (2, ""))


def test_the_config_is_checked_and_the_launcher_started(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(launcher, "run_to_end", lambda words, environment: started.append(words) or 0)
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
    monkeypatch.setattr(launcher, "run_to_end", lambda words, environment: code)
    assert launcher.run_command("ppo", [write(example("ppo"))], lambda config: None) == code
    expected = f"gearshift ppo: the processes ended with {says}\n" if says else ""
    assert capsys.readouterr().err == expected


def test_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_gpu_ids", lambda: ["GPU-aa", "GPU-ab", "GPU-b"])
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for variable, devices in {"": [], "2,0": [2, 0], "GPU-b,1": [2, 1]}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
        assert launcher.visible_gpus() == devices
    for wrong in ("3", "GPU-a", "MIG-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", wrong)
        with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
            launcher.visible_gpus()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert launcher.visible_gpus() == [0, 1, 2]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert launcher.visible_gpus() == []


def test_gpus_are_those_that_nvidia_smi_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "GPU 0: NVIDIA H200 (UUID: GPU-1)"\necho "  MIG 1g Device 0: (UUID: MIG-2)"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert launcher._gpu_ids() == ["GPU-1"]


def test_more_ranks_than_gpus(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(launcher, "visible_gpus", lambda: [0])
    assert launcher.run_command("ppo", [write(example("ppo")), "--run.ranks", "2"], lambda config: None) == 2
    assert "run.ranks: 2, but 1 GPUs are visible" in capsys.readouterr().err


def test_hostfile(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# two machines\nworker-0 slots=8\n\nworker-1 slots=4  # half\n")
    assert launcher.hostfile_ranks(str(hosts)) == 12
    hosts.write_text("worker-0 slots=8\nworker-1\n")
    with pytest.raises(UserError, match="hosts:2: should read HOST slots=N, not 'worker-1'"):
        launcher.hostfile_ranks(str(hosts))


def test_environment_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    launcher.prepare_environment()
    assert (os.environ["LOCAL_SIZE"], os.environ["OMP_NUM_THREADS"]) == ("2", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    launcher.prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_every_process(tmp_path: Path, number: signal.Signals) -> None:
    """The launcher's child (here a sleep that outlives its parent) is gone when `gearshift` is."""
    code = (
        "import os, sys; from gearshift.launch.launcher import run_to_end; "
        "sys.exit(run_to_end(sys.argv[1:], dict(os.environ)))"
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
    words = launcher.launch_command("pretrain", Arguments(config=toy_config(1)), 2, [], launcher.free_port())
    words[words.index("gearshift.launch.pretrain")] = "tests.launch.toy_stage"
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr == "gearshift pretrain: rank 1 found an empty row\n"
    assert done.returncode == 2


def test_a_crash_keeps_its_traceback(here: Path) -> None:
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    words = [sys.executable, "-m", "tests.launch.toy_stage", "--local_rank=0", "--config", toy_config(2)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("RuntimeError: a broken stage\n\n")
    assert done.returncode == 1
