"""Room on disks and in shared memory, limits, threads. No torch is imported here."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gearshift.launch.doctor.findings import WRONG, Finding, note, ok, wrong

GIB = 1 << 30
# Of /dev/shm, what NCCL takes for the ranks of a host.
NCCL_BYTES = GIB // 8


def findings(run_folder: Path, ranks: int, gpus: bool) -> Iterator[Finding]:
    """Of this host, for `ranks` processes on it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "huggingface"
    for what, folder, enough, use in [
        ("run folder", run_folder, 50 * GIB, "a checkpoint of policy and critic takes 28 bytes a parameter"),
        ("TMPDIR", Path(tempfile.gettempdir()), GIB, "compilers and libraries write there: set TMPDIR elsewhere"),
        ("HF_HOME", Path(home), 20 * GIB, "models and data from the hub are kept there: set HF_HOME elsewhere"),
    ]:
        there = nearest(folder)
        found = room_finding(what, folder, shutil.disk_usage(there).free, os.access(there, os.W_OK), enough, use)
        # A cache that is full or not ours is in the way of downloads alone.
        yield note(what, found.found, found.to_do) if what == "HF_HOME" and found.level == WRONG else found
    shared = Path("/dev/shm")
    if gpus and shared.is_dir():
        usage = shutil.disk_usage(shared)
        yield shared_memory_finding(usage.free, usage.total)
    yield open_files_finding(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield threads_finding(os.environ.get("OMP_NUM_THREADS"), cores, cpu_quota(), ranks)
    free = available_memory()
    if free is not None:
        yield ok("memory", f"{free / GIB:.1f} GiB available")


def nearest(folder: Path) -> Path:
    """The folder, or what of its parents is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def room_finding(what: str, folder: Path, free: int, writable: bool, enough: int, use: str) -> Finding:
    """`free` bytes; a run fails below 100 MB, and may below `enough`."""
    found = f"{free / GIB:.1f} GiB free in {folder}"
    if not writable:
        return wrong(what, f"{folder} cannot be written", f"{use}; take another folder, or its owner's rights")
    if free < 100e6:
        return wrong(what, found, use)
    return ok(what, found) if free >= enough else note(what, found, use)


def shared_memory_finding(free: int, total: int) -> Finding:
    """NCCL uses /dev/shm. (Ranks on processors share memory that is no part of it.)"""
    found = f"{free / GIB:.2f} of {total / GIB:.2f} GiB free in /dev/shm"
    larger = "in a container: docker run --shm-size=8g (or --ipc=host); else remove what jobs that died left there"
    if free < NCCL_BYTES:
        return wrong("shared memory", found, f"NCCL needs {NCCL_BYTES / GIB:.2f} GiB; {larger}")
    return note("shared memory", found, larger) if free < GIB else ok("shared memory", found)


def open_files_finding(soft: int) -> Finding:
    """Each rank opens sockets to all others, and the files of model and data."""
    found = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,} for each process"
    if soft != resource.RLIM_INFINITY and soft < 256:
        return wrong("open files", found, "a rank needs more: ulimit -n 65536 in the shell that starts the run")
    if soft != resource.RLIM_INFINITY and soft < 4096:
        return note("open files", found, "many ranks or shards need more: ulimit -n 65536")
    return ok("open files", found)


def threads_finding(asked: str | None, cores: int, quota: float | None, ranks: int) -> Finding:
    """OMP_NUM_THREADS against the cores that this process may use, and the container's share of them (`quota`)."""
    usable = min(cores, quota) if quota else cores
    found = f"{cores} cores" + (f", of which the container gets {quota:.1f}" if quota and quota < cores else "")
    fair = max(1, int(usable // ranks))
    if asked is None:
        if usable < cores and cores // ranks > fair:
            return note("threads", f"{found}; {cores // ranks} a rank", f"too many: export OMP_NUM_THREADS={fair}")
        return ok("threads", f"{found}; a rank takes cores / ranks, here {max(1, cores // ranks)}")
    if not asked.isdigit() or int(asked) < 1:
        return wrong("threads", f"OMP_NUM_THREADS={asked}", "should be a number from 1: unset it")
    if int(asked) * ranks > usable:
        return note(
            "threads",
            f"{found}; OMP_NUM_THREADS={asked} for {ranks} ranks",
            f"they hinder each other: unset it, or {fair}",
        )
    return ok("threads", f"{found}; OMP_NUM_THREADS={asked}")


def cpu_quota() -> float | None:
    """Cores that the control group grants (version 2, then 1); None without a limit."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            folder = Path("/sys/fs/cgroup/cpu")
            limit, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return None
    return int(limit) / int(period) if limit.isdigit() and int(period) else None


def available_memory() -> int | None:
    """Bytes; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
