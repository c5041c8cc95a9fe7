"""Attention that `scaled_dot_product_attention` cannot do: capped scores (Gemma 2) and sinks (GPT-OSS).

Letters: n rows, K key/value heads, g query heads for each of them, T new positions, C cached positions, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Scores computed at a time: they are built here, in fp32.
_MAX_SCORES = 1 << 27


def score_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query [n, K·g, T, D], keys and values [n, K, C, D] -> [n, K·g, T, D].

    `visible`: True where a position may be seen, broadcast to [n, K, T, C]. `softcap`: scores become
    `softcap · tanh(score / softcap)`. `sinks [K·g]`: a score for each head that takes part in the softmax and has no
    value.
    """
    n, kv_heads = keys.shape[:2]
    per_row = query.shape[1] * query.shape[2] * keys.shape[2]
    step = max(1, _MAX_SCORES // per_row)
    visible = visible.expand(n, -1, -1, -1)[:, :, None]
    grouped = query.unflatten(1, (kv_heads, -1))
    parts = [
        _attend(grouped[i : i + step], keys[i : i + step, :, None], values[i : i + step, :, None],
                visible[i : i + step], scaling, softcap, sinks)
        for i in range(0, n, step)
    ]  # fmt: skip
    return torch.cat(parts).flatten(1, 2)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """query [n, K, g, T, D], keys and values [n, K, 1, C, D] -> [n, K, g, T, D]."""
    scores = (query @ keys.transpose(-1, -2) * scaling).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is None:
        return scores.softmax(-1).to(values.dtype) @ values
    sink = sinks.float().view(query.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return weights.to(values.dtype) @ values
