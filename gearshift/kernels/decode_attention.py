"""Attention of a step of decoding: one new position a row, its keys and values in a cache.

Letters: n rows, h query heads, k key/value heads, D size of a query or key head, E of a value head, C capacity.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gearshift.kernels import native
from gearshift.kernels.native import tasks
from gearshift.kernels.score_attention import score_attention


class Columns:
    """Where each of n rows gets its newest entry: `positions [n]` int64. What all layers of a step ask of it is worked
    out once.

    But for the compiled function a position may be −1, for a row that nobody reads; what it gets means nothing, and its
    entry may go into its last column. `width`: columns that are looked at, above every position; not given, it is read
    off the positions, for which the host waits for a GPU.
    """

    def __init__(self, positions: Tensor, width: int | None = None):
        self.positions = positions
        self._width = width
        self._visible: dict[int | None, Tensor] = {}

    def __len__(self) -> int:
        return len(self.positions)

    @functools.cached_property
    def rows(self) -> Tensor:
        """0, 1, ... n − 1."""
        return torch.arange(len(self), device=self.positions.device)

    @property
    def width(self) -> int:
        """Columns that any row has, or more."""
        if self._width is None:
            self._width = int(self.positions.max()) + 1
        return self._width

    @functools.cached_property
    def newest(self) -> Tensor:
        """[n]: the last column that each row sees."""
        return self.positions.clamp(min=0)

    @functools.cached_property
    def lengths(self) -> Tensor:
        """[n] int32: how many columns each row sees, where no window says otherwise."""
        return (self.newest + 1).int()

    def write(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> None:
        """Each row's new key and value into the cache."""
        keys[self.rows, :, self.positions], values[self.rows, :, self.positions] = key, value

    def visible(self, window: int | None) -> Tensor:
        """`[n, 1, 1, width]` bool: up to a row's position and, with a window, no further back than window − 1."""
        if window not in self._visible:
            age = self.newest[:, None] - torch.arange(self.width, device=self.positions.device)
            seen = age >= 0 if window is None else (age >= 0) & (age < window)
            self._visible[window] = seen[:, None, None]
        return self._visible[window]


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    columns: Columns,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Writes each row's new key and value into the cache, and attends to what the row has there. No gradients.

    query `[n, h, D]`, key `[n, k, D]`, value `[n, k, E]`; the cache keys `[>= n, k, C, D]`, values `[>= n, k, C, E]`,
    contiguous, of which the first n rows are written and read. A row sees what is up to its own position and, with a
    `window`, no further back than window − 1. Scores are `scaling · q·k`, capped as `softcap · tanh(score / softcap)`;
    sinks `[h]` are scores of a column without value (gpt-oss). -> `[n, h, E]`.
    """
    on_gpu = implementation(query)
    if on_gpu is not None:
        return on_gpu.attend(query, key, value, keys, values, columns, scaling, window, softcap, sinks)
    if _serves(query, keys, values):
        return _through_library(query, key, value, keys, values, columns.positions, scaling, window, softcap, sinks)
    n, width = len(columns), columns.width
    columns.write(key, value, keys, values)
    return _attend(query, keys[:n, :, :width], values[:n, :, :width], columns.visible(window), scaling, softcap, sinks)


def implementation(query: Tensor) -> Any:
    """The kernels for this device, None: those of torch."""
    if not query.is_cuda:
        return None
    from gearshift.kernels import decode_attention_triton

    return decode_attention_triton


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scaling: float, softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """visible `[n, 1, 1, C]` bool."""
    if softcap is not None or sinks is not None:
        return score_attention(query[:, :, None], keys, values, visible, scaling, softcap, sinks)[:, :, 0]
    rows, heads, size = query.shape
    # The query heads of one key/value head become query positions: no repeated keys.
    grouped = query.reshape(rows, keys.shape[1], -1, size)
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=visible, scale=scaling)
    return out.reshape(rows, heads, -1)


def _serves(*tensors: Tensor) -> bool:
    return native.built() is not None and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)


_Arguments = tasks.structure(
    "DecodeAttention",
    "heads i, kv_heads i, capacity i, key_size i, value_size i, window i, scaling d, softcap d, query p, key p, "
    "value p, keys p, values p, positions p, sinks p, out p",
)


def _through_library(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scaling: float,
    window: int | None, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    rows, heads, size = query.shape
    kv_heads, capacity = keys.shape[1:3]
    query, key, value, positions = (x.contiguous() for x in (query, key, value, positions))
    sinks = None if sinks is None else sinks.float().contiguous()
    assert keys.is_contiguous()
    assert values.is_contiguous()
    out = torch.empty(rows, heads, value.shape[2])
    sizes = (heads, kv_heads, capacity, size, value.shape[2], window or 0, scaling, softcap or 0.0)
    pointers = map(native.pointer, (query, key, value, keys, values, positions, sinks, out))
    tasks.do(tasks.Task("decode_attention", _Arguments(*sizes, *pointers), rows * kv_heads))
    return out
