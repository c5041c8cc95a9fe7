"""`decode_attention` through flash-attn, which reads of each row's cache no more than the row has.

Letters as in `decode_attention`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gearshift.kernels.decode_attention import Columns

# flash-attn 2's `flash_attn_with_kvcache` (from 2.6 on, which caps scores).
FlashKernel = Callable[..., Tensor]


def flash_decode(
    kernel: FlashKernel,
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
) -> Tensor:
    """What `decode_attention` gives; bf16 or fp16, E = D <= 256, and no sinks, which `kernel` does not know."""
    n, width = len(columns), columns.width
    columns.write(key, value, keys, values)
    out = kernel(
        query[:, None],
        keys[:n, :, :width].transpose(1, 2),
        values[:n, :, :width].transpose(1, 2),
        cache_seqlens=columns.lengths,
        softmax_scale=scaling,
        causal=True,
        # How far it looks to the left of the newest position, which a window of `transformers` counts.
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )
    return out[:, 0]
