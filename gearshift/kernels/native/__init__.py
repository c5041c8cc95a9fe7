"""The compiled library of the kernels for processors, called through ctypes.

setup.py builds it where there is a C compiler, once for each kind of processor. Where there was none, `built()` is None
and the operations take their way through torch, which is slower.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
PARTS_A_THREAD = 4
WORTH_THREADS = 1 << 17  # numbers for which a second thread is worth waking


# Of the best kinds first, those that setup.py builds: what torch says of this processor, or was told by the environment
# (ATEN_CPU_CAPABILITY), and the libraries that it can run.
LIBRARIES = {"AVX512": ("_avx512", "_avx2", "_plain"), "AVX2": ("_avx2", "_plain")}


@functools.cache
def built() -> ctypes.CDLL | None:
    """The library for this processor, if there is one."""
    for name in LIBRARIES.get(torch.backends.cpu.get_cpu_capability(), ("_plain",)):
        spec = importlib.machinery.PathFinder.find_spec(name, __path__)
        if spec is not None and spec.origin is not None:
            return ctypes.CDLL(spec.origin)
    return None


KINDS = {"i": ctypes.c_int64, "d": ctypes.c_double, "p": ctypes.c_void_p}


@functools.cache
def function(name: str, arguments: str) -> Callable[..., int]:
    """A function of the library, which must be there, to be called with Python's numbers and with `pointer`s.

    `arguments`: a letter for each, i an int64, d a double, p a pointer (None: NULL). What a void function returns means
    nothing.
    """
    library = built()
    assert library is not None
    found = getattr(library, f"gearshift_{name}")
    found.argtypes = [KINDS[kind] for kind in arguments]
    return found


_notes: list[Callable[[str, Callable[[], int]], None]] = []
_around: Callable[[str], AbstractContextManager[Any]] | None = None


def run(name: str, call: Callable[[], int]) -> int:
    """`call()`, a call of the library's function `name`, whose arguments stay what they are; told to who has asked for
    that (`noted`)."""
    for note in _notes:
        note(name, call)
    return call() if _around is None else within(name, call)


def within(name: str, call: Callable[[], Any]) -> Any:
    """`call()` inside of what `surrounded` was given, if it was."""
    if _around is None:
        return call()
    with _around(f"gearshift::{name}"):
        return call()


def is_surrounded() -> bool:
    return _around is not None


@contextmanager
def surrounded(around: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """Every call of the library in here is inside `around("gearshift::NAME")`: a profiler does not see it by itself."""
    global _around
    _around = around
    try:
        yield
    finally:
        _around = None


@contextmanager
def noted(note: Callable[[str, Callable[[], int]], None]) -> Iterator[None]:
    """Every call of the library in here is given to `note`."""
    _notes.append(note)
    try:
        yield
    finally:
        _notes.remove(note)


def serves(*tensors: Tensor) -> bool:
    """Whether the library is there, for fp32 on a processor; or on no device, where operations give shapes alone."""
    return built() is not None and all(t.dtype == torch.float32 and t.device.type in ("cpu", "meta") for t in tensors)


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def over_rows(work: Callable[[int, int], T], rows: int) -> list[T]:
    """`work(first, last)` on parts of the rows, by as many threads as torch has: ctypes lets go of Python's lock.

    What it returned, in any order. The calling thread takes part after part and helpers take from the same heap: nobody
    waits for a helper that the system starts late, such as behind OpenMP's threads, which spin for a while after work.
    """
    threads = min(rows, torch.get_num_threads())
    if threads == 1:
        return [work(0, rows)]
    parts = min(rows, PARTS_A_THREAD * threads)
    heap = iter([(rows * part // parts, rows * (part + 1) // parts) for part in range(parts)])

    def drain() -> list[T]:
        return [work(*span) for span in heap]

    helpers = [_pool(threads - 1).submit(drain) for _ in range(threads - 1)]
    found = drain()
    return found + [one for helper in helpers if not helper.cancel() for one in helper.result()]


def spread(name: str, fields: str, rows: int, numbers: int, *values: float | None) -> None:
    """The library's function `name(first, last, given)` on rows 0 to `rows`; of many `numbers` in parts, by as many
    threads as torch has. given: a struct of the values, of which `fields` says what they are (`function`)."""
    work, given = function(name, "iip"), ctypes.byref(_struct(fields)(*values))
    threads = min(rows, torch.get_num_threads()) if numbers >= WORTH_THREADS else 1
    if threads <= 1:
        call: Callable[[], Any] = functools.partial(work, 0, rows, given)
    elif (parallel := _parallel()) is not None:
        parts, address = PARTS_A_THREAD * threads, ctypes.cast(work, ctypes.c_void_p)  # type: ignore[arg-type]
        call = functools.partial(function("spread", "piipip"), parallel, threads, parts, address, rows, given)
    else:
        call = functools.partial(over_rows, lambda first, last: work(first, last, given), rows)
    run(name, call)


@functools.cache
def _struct(fields: str) -> type[ctypes.Structure]:
    named = [(f"_{number}", KINDS[kind]) for number, kind in enumerate(fields)]
    return type("Given", (ctypes.Structure,), {"_fields_": named})


@functools.cache
def _parallel() -> ctypes.c_void_p | None:
    """The function of the OpenMP that torch has loaded which runs another on its threads; None if it has no such."""
    found = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if found is None else ctypes.cast(found, ctypes.c_void_p)


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "gearshift-kernels")
