"""Tasks: calls of the library whose work its own threads share, several of them at a time.

A list of tasks is one call, whatever their number: no Python between them, and helpers that stay awake.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch

from gearshift.kernels import native


class Task(NamedTuple):
    """The library's function `name` with its `arguments`, done on `units` that threads share, at least `grain` each.

    Arguments hold addresses: what lies there has to stay. `beside`: tasks next to each other that have the same one do
    not wait for each other (None: they wait).
    """

    name: str
    arguments: ctypes.Structure
    units: int
    grain: int = 1
    beside: int | None = None


class _Task(ctypes.Structure):
    _fields_ = [
        ("work", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("units", "grain", "waits")),
    ]


# What a task may fail by (team.h has the same numbers); the last plus a rank: that has ended.
NOT_YET, TOO_LATE, _NO_MEMORY, _LEFT_ALONE = -2, -1, 1, 2


def failure(code: int) -> ConnectionError:
    """Of processes that wait for each other."""
    if code == TOO_LATE:
        return ConnectionError("this rank has waited for others, which live and do not come")
    return ConnectionError(f"rank {code - _LEFT_ALONE} has ended, this one waits for it")


class Tasks:
    """Does tasks one after the other, by as many threads as torch has. After one that fails none is done.

    Raises MemoryError when there is none, and ConnectionError where another rank has ended or does not come.
    """

    def __init__(self, tasks: Iterable[Task]):
        self.tasks = list(tasks)
        self._list = (_Task * len(self.tasks))(*self._listed())

    def _listed(self) -> Iterable[_Task]:
        last: Task | None = None
        for task in self.tasks:
            waits = last is None or task.beside is None or (task.name, task.beside) != (last.name, last.beside)
            yield _Task(_address(task.name), ctypes.addressof(task.arguments), task.units, task.grain, waits)
            last = task

    def __call__(self) -> int:
        failed = native.function("do_tasks", "pii")(self._list, len(self._list), torch.get_num_threads())
        if failed == _NO_MEMORY:
            raise MemoryError(f"no memory for a step of {', '.join(sorted({task.name for task in self.tasks}))}")
        if failed:
            raise failure(failed)
        return failed


def do(task: Task) -> None:
    native.run(task.name, Tasks([task]))


@functools.cache
def _address(name: str) -> int:
    library = native.built()
    assert library is not None
    address = ctypes.cast(getattr(library, f"gearshift_{name}"), ctypes.c_void_p).value
    assert address is not None
    return address


def structure(name: str, fields: str) -> type[ctypes.Structure]:
    """A structure of C. `fields`: "rows i, scale d, x p": an int64, a double, a pointer (None: NULL)."""
    pairs = [field.split() for field in fields.split(",")]
    return type(name, (ctypes.Structure,), {"_fields_": [(field, native.KINDS[kind]) for field, kind in pairs]})
