"""Bytes of live tensors: what is allocated and not freed, operation by operation, on any device or on none (meta)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_IGNORED = -1  # in place of a size


class LiveBytes(TorchDispatchMode):
    """Counts each storage once, from the operation that returns it until nothing refers to it any more.

    `bytes` now, `peak` since the last `reset_peak`. Counted are tensors that operations return to Python or to autograd
    while the mode is on, those inside of Gearshift's own operators too; not what one operation of torch needs on the
    way and frees before it returns, nor memory that torch's allocator does not give (NCCL, gloo, cuBLAS). A storage
    that is resized counts with its new size. `changed(bytes)` is called at each allocation, after it.
    """

    def __init__(self, changed: Callable[[int], None] | None = None):
        super().__init__()
        self.bytes = self.peak = 0
        self._changed = changed
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._resize: Any = None
        self._depth = 0

    def ignore(self, *tensors: Tensor) -> None:
        """These do not count, now or later."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._known.get(storage._cdata)
            if known is not None and known[0]() is storage and known[1] != _IGNORED:
                self.bytes -= known[1]
            self._known[storage._cdata] = (weakref.ref(storage), _IGNORED)

    def reset_peak(self) -> None:
        self.peak = self.bytes

    def __enter__(self) -> LiveBytes:
        if not self._depth:  # it is entered again inside of our own operators
            self._resize, counting = torch.UntypedStorage.resize_, self

            def resize(storage: Any, size: int) -> Any:
                result = counting._resize(storage, size)
                counting._add(storage)
                return result

            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if not self._depth:
            torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self.run(func, args, kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation. What one of Gearshift's own does inside counts as well."""
        if func.namespace == "gearshift":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        return func(*args, **kwargs)

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is not None and known[0]() is storage:
            if known[1] in (size, _IGNORED):
                return
            self.bytes -= known[1]
        self._known[key] = (weakref.ref(storage, lambda ref: self._gone(key, ref)), size)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        if self._changed is not None:
            self._changed(self.bytes)

    def _gone(self, key: int, ref: Any) -> None:
        known = self._known.get(key)
        if known is not None and known[0] is ref:
            self.bytes -= known[1]
            del self._known[key]
