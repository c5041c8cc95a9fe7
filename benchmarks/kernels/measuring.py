"""Time and peak memory of variants of one operation, all in turn in one process: A B C A B C ...

What a machine does besides falls on all variants alike, and a ratio is taken pair by pair within a turn.
"""

from __future__ import annotations

import ctypes
import gc
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# GPU: cycles that the device waits before a timed run, about 1 ms. The host launches meanwhile, so that what is timed
# is the kernels and not the launching of the first ones.
HEAD_START = 2_000_000


@dataclass(frozen=True)
class Variant:
    """`run` does one pass and returns its results, the first of which is compared with the other variants'."""

    name: str
    run: Callable[[], Any]
    needs: float = 0  # bytes, about; left out where that is more than what is free
    compiled: bool = False  # its first run compiles, for which there is a limit
    comparable: bool = True  # False for a floor, which computes something else


@dataclass
class Measured:
    seconds: list[float] = field(default_factory=list)  # on a GPU: of the device, with launches queued ahead
    wall: list[float] = field(default_factory=list)  # until the host has the result; on a CPU the same
    peak: int | None = None  # bytes above what was there before, results and gradients included
    total: float | None = None  # sum of the first result, without its sign: losses are negative log-probs

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Results:
    measured: dict[str, Measured]
    left_out: dict[str, str]  # name -> why

    def ratio(self, name: str, base: str) -> float | None:
        """Median over the turns of one time over the other; None where either was left out."""
        if name not in self.measured or base not in self.measured:
            return None
        pairs = zip(self.measured[name].seconds, self.measured[base].seconds, strict=True)
        return statistics.median(own / other for own, other in pairs)


def measure(variants: Sequence[Variant], repeats: int, device: torch.device, compile_limit: float) -> Results:
    """`compile_limit`: seconds; 0: without the variants that compile."""
    results = Results({}, {})
    if not compile_limit:
        variants = [variant for variant in variants if not variant.compiled]
    ready = [variant for variant in variants if warm_up(variant, device, compile_limit, results)]
    for _ in range(repeats):
        for variant in ready:
            time_once(variant, device, results.measured[variant.name])
    for variant in ready:
        results.measured[variant.name].peak = peak_bytes(variant.run, device)
    return results


def warm_up(variant: Variant, device: torch.device, compile_limit: float, results: Results) -> bool:
    """Two runs, the first of which may compile. Whether the variant can be measured; if not, why is kept.

    Any failure of a peer is a line of the report and not the end of it.
    """
    free = free_bytes(device)
    if variant.needs > free:
        reason = f"needs about {variant.needs / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        results.left_out[variant.name] = reason
        return False
    try:
        with time_limit(compile_limit if variant.compiled else 0):
            variant.run()
        found = variant.run()
        total = abs(float(first(found).detach().double().sum())) if variant.comparable else None
    except _OutOfTimeError:
        torch._dynamo.reset()  # it was stopped in the middle of something
        results.left_out[variant.name] = f"compiling took longer than {compile_limit:.0f} s"
        return False
    except Exception as error:
        lines = str(error).splitlines() or [""]
        results.left_out[variant.name] = f"{type(error).__name__}: {lines[0][:200]}"
        return False
    results.measured[variant.name] = Measured(total=total)
    return True


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of it for fixed shapes, from the first call on: its import alone takes seconds."""
    ready: list[Callable[..., Any]] = []

    def call(*arguments: Any, **named: Any) -> Any:
        if not ready:
            ready.append(torch.compile(function, dynamic=False))
        return ready[0](*arguments, **named)

    return call


def forget_compiled() -> None:
    """Between shapes: else torch.compile would, after one shape, make code for all."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def first(found: Any) -> torch.Tensor:
    return found if isinstance(found, torch.Tensor) else found[0]


class _OutOfTimeError(BaseException):
    """Not an Exception: compilers catch those and go on."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises _OutOfTimeError after so many seconds; 0: never. In the main thread only, as signals are."""

    def stop(*_: object) -> None:
        raise _OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- time ------------------------------------------------------------------------------------------------------------


def time_once(variant: Variant, device: torch.device, into: Measured) -> None:
    into.wall.append(wall_seconds(variant.run, device))
    into.seconds.append(device_seconds(variant.run) if device.type == "cuda" else into.wall[-1])


def wall_seconds(run: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    found = run()
    synchronize(device)
    seconds = time.perf_counter() - start
    del found  # not in the time: what a caller does with the results is its own affair
    return seconds


def device_seconds(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    found = run()
    end.record()
    torch.cuda.synchronize()
    del found
    return start.elapsed_time(end) / 1000


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Most memory that a run holds above what there was before; None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = run()
        torch.cuda.synchronize()
        del found
        return torch.cuda.max_memory_allocated() - before
    give_pages_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = status_bytes("VmRSS")
    except OSError:
        return None
    found = run()
    del found
    return max(0, status_bytes("VmHWM") - before)


def give_pages_back() -> None:
    """Freed pages that the allocator keeps would serve the next variant without being counted."""
    with suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def status_bytes(name: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")


def free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else float("inf")
