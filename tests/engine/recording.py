"""A stand-in for CUDA graphs: operations are recorded with the tensors that they worked on, and done again."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gearshift.kernels import native

# What makes the host wait for a device, or gives as much as the values say.
FORBIDDEN = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal", "is_nonzero"}


class Recording:
    """Records as `CudaGraphs` does: a first run, one that is recorded, and a replay that no Python code takes part in.

    Every operation reads and writes the tensors of the recorded run, at their addresses. Raises RuntimeError, as CUDA
    would, when the host asks for a value. `made`: how many recordings there have been.
    """

    made = 0
    exact, block = False, 256

    def record(self, step: Callable[[], None]) -> Callable[[], Any]:
        step()
        with _Log() as log:
            step()
        Recording.made += 1
        return log.replay


class Again(Recording):
    """Runs the step as it is each time: for sums over ranks, which a recording here would not see."""

    def record(self, step: Callable[[], None]) -> Callable[[], Any]:
        step()
        Recording.made += 1
        return step


@contextmanager
def torch_only() -> Iterator[None]:
    """As on a GPU: none of the compiled functions, whose work a recording would not see."""
    few_rows = importlib.import_module("gearshift.kernels.few_rows_linear")
    with patch.object(native, "built", lambda: None), patch.object(few_rows, "tile", lambda: 0):
        yield


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self._calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self._calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)
