"""Two hosts on one machine: network, process, mount and host name spaces of their own, and an sshd in each.

Their network cards, both called eth0, are the two ends of one cable (a veth pair). Nothing of a host is seen outside
it, and nothing is left when its first process has ended. Hosts share the file system, but for /dev/shm, /run and what a
test puts in a place of its own (`Host.replaced`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
}

# The first process of a host. It waits for its end of the cable; then it is the host's sshd.
_FIRST = """
set -e
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind {folder}/ssh /etc/ssh
mount --bind {folder}/hosts-of-{name} /etc/hosts
hostname {name}
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip address add {address}/24 dev eth0
ip link set lo up
ip link set eth0 up
exec {sshd} -D -e -h /etc/ssh/key
"""

_SSHD = """
AuthorizedKeysFile /etc/ssh/key.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
MaxStartups 100
"""

_SSH = """
Host *
IdentityFile /etc/ssh/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


def missing() -> str:
    """Why there can be no hosts here, or nothing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    absent = sorted({package for tool, package in PACKAGES.items() if shutil.which(tool, path=_path()) is None})
    if absent:
        return f"apt-get install {' '.join(absent)}"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "ip", "link", "add", "eth0", "type", "veth"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"namespaces or veth pairs are not allowed here: {tried.stderr.strip()}" if tried.returncode else ""


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


@dataclass
class Host:
    name: str
    address: str
    first: int  # the id, outside, of its first process

    def words(self, *words: str, folder: Path = ROOT) -> list[str]:
        """The command that runs `words` on this host, in `folder`."""
        spaces = ["--net", "--uts", "--pid", "--mount"]
        return ["nsenter", f"--target={self.first}", *spaces, f"--wd={folder}", *words]

    def run(self, *words: str) -> str:
        return subprocess.run(self.words(*words), check=True, capture_output=True, text=True).stdout

    @contextmanager
    def replaced(self, path: Path, by: Path) -> Iterator[None]:
        """`path` is what `by` is, on this host alone."""
        self.run("mount", "--bind", str(by), str(path))
        try:
            yield
        finally:
            self.run("umount", str(path))

    def cable(self, state: str) -> None:
        """`down` or `up`."""
        self.run("ip", "link", "set", "eth0", state)

    def find(self, words: str) -> int:
        """The process id, on this host, of the one Python process whose command line has these words."""
        listing = self.run("ps", "-ww", "-eo", "pid=,args=")
        found = [line.split() for line in listing.splitlines() if words in line and "launcher.launch" not in line]
        (process,) = [line[0] for line in found if "python" in line[1] and "deepspeed.launcher.runner" not in line]
        return int(process)

    def pythons(self) -> list[str]:
        """Command lines of Python processes that live here."""
        listing = self.run("ps", "-ww", "-eo", "stat=,args=")
        return [line for line in listing.splitlines() if "python" in line and not line.startswith("Z")]


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """gear-a and gear-b, 10.77.0.1 and .2."""
    names = {"gear-a": "10.77.0.1", "gear-b": "10.77.0.2"}
    folder = Path(tempfile.mkdtemp(prefix="gearshift-hosts-"))
    started: list[subprocess.Popen[bytes]] = []
    try:
        _write_ssh(folder)
        for own in names:  # which leads to the loopback, as on Debian
            lines = [f"{'127.0.1.1' if name == own else address} {name}" for name, address in names.items()]
            (folder / f"hosts-of-{own}").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        hosts = []
        for name, address in names.items():
            with (folder / f"{name}.log").open("wb") as log:
                started.append(_start(folder, name, address, log.fileno()))
            hosts.append(Host(name, address, _child(started[-1].pid)))
        a, b = hosts
        cable = f"ip link add eth0 type veth peer name eth0 netns {b.first}"
        subprocess.run(["nsenter", f"--target={a.first}", "--net", *cable.split()], check=True)
        for host in hosts:
            _wait_for_ssh(a, host)
        yield a, b
    finally:
        for process in started:
            process.kill()  # and with it, by --kill-child, the host's first process and so all of it
            process.wait()
        shutil.rmtree(folder)


def _write_ssh(folder: Path) -> None:
    (folder / "ssh").mkdir()
    key = folder / "ssh/key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    (folder / "ssh/sshd_config").write_text(_SSHD)
    (folder / "ssh/ssh_config").write_text(_SSH)


def _start(folder: Path, name: str, address: str, log: int) -> subprocess.Popen[bytes]:
    sshd = shutil.which("sshd", path=_path())
    script = _FIRST.format(folder=folder, name=name, address=address, sshd=sshd)
    spaces = ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
    return subprocess.Popen([*spaces, "sh", "-c", script], stdout=log, stderr=log, env={**os.environ, "PATH": _path()})


def _child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    _wait_until(lambda: children.read_text().strip() != "", "the first process of a host")
    return int(children.read_text())


def _wait_for_ssh(here: Host, there: Host) -> None:
    words = here.words("ssh", there.name, "true")
    _wait_until(
        lambda: subprocess.run(words, check=False, capture_output=True).returncode == 0, f"an sshd on {there.name}"
    )


def _wait_until(done: object, what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come within {seconds:g} s")
        time.sleep(0.05)
