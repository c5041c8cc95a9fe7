"""Steps of decoding on a processor, recorded: what was done to which tensors, without the Python that decided it.

A step of a small batch is hundreds of operations of a few microseconds each, and as much again for the modules that
call them. A recording keeps every tensor of one step and does the same operations on them again, in place, as a CUDA
graph does on a GPU. Some that follow each other are done as one, to the same bits (see `joining`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gearshift.engine.joining import Call, Done, apart, joined
from gearshift.kernels import native

# What gives values to Python, or as much as the values say: another step would need another recording.
_READS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal", "is_nonzero"}
_TO_PYTHON = {"tolist", "numpy", "item", "__bool__", "__int__", "__float__", "__index__", "__array__"}
_MEMORY_ALONE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}


class Tape:
    """Records steps on processors; see `Recorder`.

    `record` raises RuntimeError for a step whose operations depend on what tensors hold.
    """

    exact, block = True, 1

    def record(self, step: Call) -> Call:
        log = _Log()
        with native.noted(log.note), _NothingToPython(), log:
            step()
        done = joined(log.done)
        return partial(_replay, done, [one.call for one in done], log.kept)


@torch.inference_mode()
def _replay(done: list[Done], calls: list[Call], kept: list[Any]) -> None:
    """`calls`: those of `done`; `kept`: tensors that the compiled functions know by their addresses alone."""
    if native.is_surrounded():
        for one in apart(done):
            native.within(one.name, one.call) if one.native else one.call()
        return
    for call in calls:
        call()


class _NothingToPython(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _TO_PYTHON:
            raise RuntimeError(f"{func.__name__} reads a tensor's values")
        return func(*args, **(kwargs or {}))


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[Done] = []
        self.kept: list[Any] = []

    def note(self, name: str, call: Call) -> None:
        self.done.append(Done(name, (), {}, None, call, native=True))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            raise RuntimeError(f"{name} is a sum over ranks that goes on beside the step")
        if name in _READS or (name.startswith("index") and _has_mask(args)):
            raise RuntimeError(f"{name} reads a tensor's values")
        out = func(*args, **kwargs)
        self.kept.append((args, kwargs, out))
        if not func.is_view and name not in _MEMORY_ALONE:
            call = _again(func, args, kwargs, out)
            if call is not None:
                self.done.append(Done(name, args, kwargs, out, call))
        return out


def _has_mask(args: Any) -> bool:
    """An index by truth values picks as many as are true."""
    return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(args[1:2]))


# --- an operation, again ---------------------------------------------------------------------------------------------


def _again(func: Any, args: Any, kwargs: Any, out: Any) -> Call | None:
    """The operation with its results where they were; None where it only gave a view."""
    results = _tensors(out)
    # `_op`: past a wrapper of Python.
    if func._schema.is_mutable:
        return partial(func._op, *args, **kwargs)
    given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
    if all(result.untyped_storage().data_ptr() in given for result in results):
        return None
    found = _out_variant(func)
    if found is None:
        return partial(_copied, func, args, kwargs, results)
    overload, names = found
    known = {argument.name for argument in overload._schema.arguments}
    own = {name: value for name, value in kwargs.items() if name in known}
    return partial(overload._op, *args, **own, **dict(zip(names, results, strict=True)))


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def _copied(func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
    for result, value in zip(results, _tensors(func(*args, **kwargs)), strict=True):
        result.copy_(value)


def _out_variant(func: Any) -> tuple[Any, list[str]] | None:
    """The overload that writes into given tensors, and what it calls them."""
    own = [(a.name, str(a.type)) for a in func._schema.arguments if not a.kwarg_only]
    for name in func.overloadpacket.overloads():
        overload = getattr(func.overloadpacket, name)
        outs = [a.name for a in overload._schema.arguments if a.is_out]
        rest = [(a.name, str(a.type)) for a in overload._schema.arguments if not a.is_out and not a.kwarg_only]
        if outs and len(outs) == len(func._schema.returns) and rest == own:
            return overload, outs
    return None
