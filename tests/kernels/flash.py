"""flash-attn's attention to a cache, by its documentation and through torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    """q [B, T, h, D], caches [B, S, k, D], which may be strided but for D, cache_seqlens [B] int32 -> [B, T, h, D].

    The last of T queries stands at a row's last key; a window is how far a query looks to each side of its own place,
    −1 for all; softcap 0: none.
    """
    assert q.is_contiguous()
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1
    assert q.shape[0] == k_cache.shape[0] == v_cache.shape[0]
    assert cache_seqlens.dtype == torch.int32
    left, right = window_size
    place = torch.arange(q.shape[1]) + cache_seqlens[:, None] - q.shape[1]
    ahead = torch.arange(k_cache.shape[1]) - place[:, :, None]  # [B, T, S]: how far a key is to the right of a query
    seen = torch.arange(k_cache.shape[1]) < cache_seqlens[:, None, None]
    if causal:
        seen = seen & (ahead <= 0)
    if left >= 0:
        seen = seen & (ahead >= -left)
    if right >= 0:
        seen = seen & (ahead <= right)
    keys, values = (x.transpose(1, 2).repeat_interleave(q.shape[2] // x.shape[2], 1) for x in (k_cache, v_cache))
    queries, seen = q.transpose(1, 2), seen[:, None]
    if softcap > 0:
        scores = softcap * torch.tanh(queries @ keys.mT * softmax_scale / softcap)
        out = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values
    else:
        out = scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=softmax_scale)
    return out.transpose(1, 2)
