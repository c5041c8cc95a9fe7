"""The hosts of a run as the shell sees them: are they there before it starts, and is nothing left of it at its end."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gearshift.errors import UserError
from gearshift.launch.processes import OneHost, end_group
from gearshift.rlhf.signals import STOP_FILE

CONNECT_SECONDS = 10
ANSWER_SECONDS = 30
UNREACHABLE = 255  # ssh's own exit code


@dataclass(frozen=True)
class Answer:
    code: int
    said: str
    error: str


def first_address(hosts: Sequence[str], ssh_port: str | None, master_port: int) -> tuple[str, int]:
    """Address of the first host and a port that is free there (`master_port`, if not 0).

    Raises UserError when a host cannot be reached by ssh, lacks this folder or this Python, or has the port in use.
    """
    answers = _on_each(hosts, ["check", str(master_port)], ssh_port)
    folder = os.getcwd()
    for host, answer in answers.items():
        if answer.code == UNREACHABLE:
            raise UserError(f"{host} cannot be reached by ssh (without a password): {_last_line(answer.error)}")
        if answer.code:
            raise UserError(
                f"{host} cannot start {sys.executable} in {folder}, which every host needs: {_last_line(answer.error)}"
            )
    first = hosts[0]
    if answers[first].said == "in use":
        raise UserError(f"port {master_port} of {first} is in use by another program: leave --master_port out")
    address, port = answers[first].said.split()
    return (first if address == "-" else address), int(port)


def end_ranks(hosts: Sequence[str], ssh_port: str | None, address: str, port: int) -> list[str]:
    """Ends what is left of a run on any of its hosts; returns those that could not be reached."""
    answers = _on_each(hosts, ["end", address, str(port)], ssh_port)
    return [host for host, answer in answers.items() if answer.code == UNREACHABLE]


def _on_each(hosts: Sequence[str], words: list[str], ssh_port: str | None) -> Mapping[str, Answer]:
    """remote.py on every host at once; its text goes there, so that it need not be installed to say what is missing."""
    script = Path(__file__).with_name("remote.py").read_bytes()
    command = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join([sys.executable, '-', *words])}"

    def ask(host: str) -> Answer:
        try:
            typed = ssh_words(host, ssh_port, command)
            done = subprocess.run(typed, input=script, capture_output=True, check=False, timeout=ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            return Answer(UNREACHABLE, "", f"no answer within {ANSWER_SECONDS} s")
        # The last line: before it, a login shell may have said something of its own.
        said = (done.stdout.decode(errors="replace").strip().splitlines() or [""])[-1]
        return Answer(done.returncode, said, done.stderr.decode(errors="replace"))

    with ThreadPoolExecutor(max_workers=64) as pool:
        return dict(zip(hosts, pool.map(ask, hosts), strict=True))


def ssh_words(host: str, ssh_port: str | None, command: str) -> list[str]:
    """`ssh HOST COMMAND` with the options that the launcher's own ssh gets, which never asks for a password."""
    options = [
        "-o",
        "BatchMode=yes",
        "-o",
        f"ConnectTimeout={CONNECT_SECONDS}",
        *(["-p", ssh_port] if ssh_port else []),
    ]
    return ["ssh", *options, *shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")), host, command]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing said why"])[-1]


@dataclass(frozen=True)
class SeveralHosts(OneHost):
    """How a run over several hosts is stopped. `saves`: whether it saves itself when asked to."""

    run_folder: Path
    saves: bool
    hosts: Sequence[str]
    ssh_port: str | None
    address: str
    port: int
    by_ssh: bool  # the launcher leaves ending the ranks of other hosts to us

    def ask_to_save(self, process: subprocess.Popen[bytes]) -> bool:
        """Through a file, which every host sees; a signal would have to be carried to another host."""
        if self.saves:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            (self.run_folder / STOP_FILE).touch()
        return self.saves

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Not by a signal to DeepSpeed's launcher: it would end every run that the user has on these hosts."""
        if self.by_ssh:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        end_group(process)
        self.clean_up()

    def clean_up(self) -> None:
        if not self.by_ssh:
            return
        for host in end_ranks(self.hosts, self.ssh_port, self.address, self.port):
            print(
                f"gearshift: {host} cannot be reached: its ranks end by themselves (run.hang_seconds)", file=sys.stderr
            )
