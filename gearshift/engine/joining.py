"""What a recorded step does, in fewer calls: several operations as one task of the compiled library, and tasks that
follow each other as one list."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from gearshift.kernels import decode_step
from gearshift.kernels.native.tasks import Task, Tasks

Call = Callable[[], Any]


@dataclass(frozen=True)
class Done:
    """An operation (`native`: a call of the compiled library) and what does it again."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    call: Call
    native: bool = False


def joined(done: list[Done]) -> list[Done]:
    """The same work, to the same bits."""
    return list(_listed(_as_tasks(done)))


def apart(done: list[Done]) -> Iterator[Done]:
    """What `joined` gave, with every task by itself again: for a profiler, which names them."""
    for one in done:
        if isinstance(one.call, Tasks):
            yield from map(_of_task, one.call.tasks)
        else:
            yield one


def _listed(done: list[Done]) -> Iterator[Done]:
    """Tasks in a row as one call."""
    for are_tasks, some in groupby(done, lambda one: isinstance(one.call, Tasks)):
        if are_tasks:
            call = Tasks(task for one in some for task in one.call.tasks)  # type: ignore[attr-defined]
            yield Done("tasks", (), {}, None, call, native=True)
        else:
            yield from some


def _of_task(task: Task) -> Done:
    return Done(task.name, (), {}, None, Tasks([task]), native=True)


_ROTATION = ["mul", "neg", "cat", "mul", "add"]


def _as_tasks(done: list[Done]) -> list[Done]:
    found: list[Done] = []
    at = 0
    while at < len(done):
        some = done[at : at + len(_ROTATION)]
        task, length = _rotation(some) if [one.name for one in some] == _ROTATION else None, len(_ROTATION)
        if task is None:
            task, length = _pointwise(done[at]), 1
        found.append(done[at] if task is None else _of_task(task))
        at += length
    return found


_POINTWISE = {"add": decode_step.sum_of, "mul": decode_step.product_of}


def _pointwise(one: Done) -> Task | None:
    """The sum or product of two tensors of one shape."""
    if one.name not in _POINTWISE or one.kwargs or len(one.args) != 2:
        return None
    a, b, out = (*one.args, one.out)
    if not all(isinstance(t, Tensor) and t.is_contiguous() and t.shape == out.shape for t in (a, b)):
        return None
    return _POINTWISE[one.name](a, b, out) if decode_step.serves(a, b, out) and out.is_contiguous() else None


def _rotation(some: list[Done]) -> Task | None:
    """x · cos + cat(−x₂, x₁) · sin of x `[n, h, 1, D]` in halves x₁ and x₂, as `transformers` writes it; else None."""
    straight, negated, turned, weighted, total = some
    if any(one.kwargs or len(one.args) != 2 for one in (straight, turned, weighted, total)):
        return None
    if turned.args[1] not in (-1, 3):
        return None
    (x, cos), (parts, _), (also_turned, sin) = straight.args, turned.args, weighted.args
    tensors = [x, cos, sin, also_turned, *parts, *total.args, *negated.args]
    if not all(isinstance(t, Tensor) and t.dtype == torch.float32 for t in tensors) or len(parts) != 2:
        return None
    if x.dim() != 4 or x.shape[2] != 1 or x.shape[3] % 2 or x.stride(3) != 1 or total.out.stride(3) != 1:
        return None
    first, second = x.chunk(2, -1)
    angles = (x.shape[0], 1, 1, x.shape[3])
    fits = (
        _same(parts[0], negated.out)
        and _same(parts[1], first)
        and _same(negated.args[0], second)
        and _same(also_turned, turned.out)
        and _same(total.args[0], straight.out)
        and _same(total.args[1], weighted.out)
        and all(t.dim() == 4 and t.expand(angles).stride(3) == 1 for t in (cos, sin) if _broadcasts(t, angles))
        and all(_broadcasts(t, angles) for t in (cos, sin))
    )
    if not fits:
        return None
    cos, sin = (t.expand(angles)[:, 0, 0] for t in (cos, sin))
    return decode_step.rotation(x[:, :, 0], cos, sin, total.out[:, :, 0])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _broadcasts(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    return tensor.dim() == len(shape) and all(own in (1, n) for own, n in zip(tensor.shape, shape, strict=True))
