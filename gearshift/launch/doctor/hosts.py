"""The hosts of a hostfile: can they be reached, are they alike, and do they reach each other."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gearshift.launch.doctor import software
from gearshift.launch.doctor.findings import OK, Finding, note, ok, wrong
from gearshift.launch.doctor.machine import nearest
from gearshift.launch.doctor.session import Session, Unreachable
from gearshift.launch.hosts import UNREACHABLE

SKEW_SECONDS = 2.0


def findings(asked: Mapping[str, int], run_folder: Path, ssh_port: str | None) -> Iterator[Finding]:
    """Of each host, then of each pair. `asked`: the ranks of each. Every host is asked at the same time."""
    settings = interface_settings()
    with _token(run_folder) as token, contextlib.ExitStack() as stack, ThreadPoolExecutor(64) as pool:
        sessions = {host: stack.enter_context(Session(host, ssh_port)) for host in asked}
        question = {"run_folder": str(run_folder.absolute()), "token": str(token)}
        told = pool.map(lambda h: _answer(lambda: sessions[h].ask("facts", **question, ranks=asked[h])), asked)
        answers = dict(zip(asked, told, strict=True))
        reached = {host: answer for host, answer in answers.items() if isinstance(answer, dict)}
        here = software.versions()
        for host, answer in answers.items():
            if isinstance(answer, Unreachable):
                yield unreachable_finding(host, answer.code, str(answer))
                continue
            yield from host_findings(host, answer, asked[host], here, settings, len(asked))
            if len(asked) > 1 and host == next(iter(asked)) and sessions[host].printed:
                yield printed_finding(host, sessions[host].printed[0])
        skews = pool.map(lambda h: _answer(lambda: _skew(sessions[h])), reached)
        for host, skew in zip(list(reached), skews, strict=True):
            if isinstance(skew, Unreachable):  # it was lost meanwhile
                yield unreachable_finding(host, skew.code, str(skew))
                del reached[host]
            else:
                yield clock_finding(host, *skew)
        yield from _connections({host: sessions[host] for host in reached}, reached, pool)


def _answer(ask: Callable[[], Any]) -> Any:
    """What `ask()` returns, or the Unreachable that it raises."""
    try:
        return ask()
    except Unreachable as error:
        return error


@contextlib.contextmanager
def _token(run_folder: Path) -> Iterator[Path]:
    """A file in the run folder, or in what of its parents is there, for as long as the hosts are asked."""
    path = nearest(run_folder) / f".gearshift-doctor-{uuid.uuid4().hex}"
    with contextlib.suppress(OSError):  # a folder that cannot be written is a finding of its own
        path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def unreachable_finding(host: str, code: int | None, said: str) -> Finding:
    """`code`: of ssh, `UNREACHABLE` of itself, else of what it should have run."""
    if code == UNREACHABLE:
        return wrong(
            host, f"ssh: {said}", f"`ssh {host} true` must work without a password or a question (ssh-copy-id)"
        )
    return wrong(
        host, f"the probe ended with exit code {code}: {said}",
        "the same Python environment and Gearshift must lie at the same path there, and this folder too",
    )  # fmt: skip


def printed_finding(host: str, line: str) -> Finding:
    """Of the first host, whose address DeepSpeed's launcher takes to be the first word of `ssh HOST hostname -I`."""
    return wrong(
        host, f"its shell prints {line!r} before any command", "the launcher takes the first word for the "
        "address where all ranks meet: print only in interactive shells (.bashrc, .profile)",
    )  # fmt: skip


def host_findings(
    host: str, facts: Mapping[str, Any], ranks: int, here: Mapping[str, str], settings: Mapping[str, str], hosts: int
) -> Iterator[Finding]:
    """What one host said, against what is installed `here` (name -> version)."""
    differs = {name: facts["versions"].get(name, "none") for name in here if facts["versions"].get(name) != here[name]}
    for name, version in differs.items():
        yield wrong(host, f"{name} {version}, here {here[name]}", "install the same on every host")
    if not differs:
        yield ok(host, "reached by ssh; the same versions and code as here")
    if facts["gpus"] and ranks > facts["gpus"]:
        yield wrong(host, f"slots={ranks}, but {facts['gpus']} GPUs are visible there", "ask for that or fewer")
    if hosts > 1 and not facts["sees_token"]:
        yield wrong(
            host, "does not see the run folder that this host sees",
            "checkpoints are written by all hosts: put it on a file system that they share, at the same path "
            "(--run-folder)",
        )  # fmt: skip
    for found in (Finding(**values) for values in facts["findings"]):
        if found.level != OK:
            yield Finding(found.level, host, f"{found.what}: {found.found}", found.to_do)
    if hosts > 1:
        yield network_finding(host, facts, settings)


def interface_settings() -> dict[str, str]:
    """NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME as DeepSpeed's launcher passes them on: from .deepspeed_env at home and
    here, and what begins with NCCL from the environment too."""
    found = {name: value for name, value in os.environ.items() if name == "NCCL_SOCKET_IFNAME"}
    for folder in (Path.home(), Path.cwd()):
        path = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        if path.is_file():
            pairs = (line.strip().partition("=") for line in path.read_text(encoding="utf-8").splitlines())
            found |= {name: value for name, _, value in pairs if name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")}
    return found


def network_finding(host: str, facts: Mapping[str, Any], settings: Mapping[str, str]) -> Finding:
    """Which interface ranks on this host will listen on."""
    interfaces: Mapping[str, str] = facts["interfaces"]
    name = "NCCL_SOCKET_IFNAME" if facts["gpus"] else "GLOO_SOCKET_IFNAME"
    told = ", ".join(f"{interface} {address}" for interface, address in interfaces.items())
    if name in settings:
        wanted = settings[name].lstrip("^=").split(",")
        # NCCL takes prefixes ("eth" for eth0), gloo whole names.
        there = [i for i in interfaces if any(i.startswith(w) if facts["gpus"] else i == w for w in wanted)]
        if there or settings[name].startswith("^"):
            return ok(host, f"{name}={settings[name]}, of {told}")
        return wrong(host, f"{name}={settings[name]}, and there are only {told}", "name one that every host has")
    likely = next((i for i, address in interfaces.items() if address == facts["address"]), "the interface")
    where = f"put {name}={likely} in .deepspeed_env"
    if len([address for address in interfaces.values() if not address.startswith("127.")]) > 1:
        return note(
            host, f"several networks ({told}); {name} is not set", f"if ranks find no way to each other, {where}"
        )
    return ok(host, f"one network ({told})")


def _skew(session: Session) -> tuple[float, float]:
    """Seconds that a host's clock is ahead, and how far that may be off: half of the quickest answer's time."""
    tries = []
    for _ in range(3):
        before = time.time()
        there = session.ask("time")
        after = time.time()
        tries.append(((after - before) / 2, there - (after + before) / 2))
    uncertain, skew = min(tries)
    return skew, uncertain


def clock_finding(host: str, skew: float, uncertain: float) -> Finding:
    found = f"clock {skew:+.3f} s of this one's, ± {uncertain:.3f} s"
    if abs(skew) - uncertain < SKEW_SECONDS:
        return ok(host, found)
    return note(host, found, "logs of the hosts cannot be laid side by side: run NTP (chrony) on every host")


def _connections(
    sessions: Mapping[str, Session], facts: Mapping[str, Mapping[str, Any]], pool: ThreadPoolExecutor
) -> Iterator[Finding]:
    """A TCP port of each host, from every other one, at the address that the launcher would take."""
    targets = [[facts[host]["address"], facts[host]["port"]] for host in facts]
    answers = pool.map(lambda host: _answer(lambda: sessions[host].ask("connect", to=targets)), sessions)
    for host, found in zip(facts, answers, strict=True):
        if isinstance(found, Unreachable):
            yield unreachable_finding(host, found.code, str(found))
        else:
            yield from connection_findings(host, facts, dict(zip(facts, found, strict=True)))


def connection_findings(
    host: str, facts: Mapping[str, Mapping[str, Any]], answers: Mapping[str, Mapping[str, Any]]
) -> Iterator[Finding]:
    """`answers`: of this host's connections, by the host that they went to: {"from": own address} or {"error": ...}."""
    by_address = {address: name for name, address in facts[host]["interfaces"].items()}
    through: dict[str, list[str]] = {}
    for other, answer in answers.items():
        if other == host:
            continue
        if "error" in answer:
            yield wrong(
                host, f"does not reach {other} ({facts[other]['address']}, TCP): {answer['error']}",
                "ranks connect to each other on any port: open the firewall between the hosts",
            )  # fmt: skip
        else:
            through.setdefault(by_address.get(answer["from"], answer["from"]), []).append(other)
    for interface, others in through.items():
        yield ok(host, f"reaches {', '.join(others)} through {interface}")
