"""Attention with capped scores and with sinks, alone and through the cache, against its definition in loops."""

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.engine.cache import KeyValueCache
from gearshift.kernels import score_attention

# The package's attribute of this name is the function.
MODULE = importlib.import_module("gearshift.kernels.score_attention")
ROWS, HEADS, KV_HEADS, LENGTH, SIZE = 3, 4, 2, 11, 8


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Causal attention, one score at a time: [n, heads, T, D]."""
    out = torch.zeros_like(query)
    for n in range(query.shape[0]):
        for h in range(query.shape[1]):
            k, v = key[n, h * key.shape[1] // query.shape[1]], value[n, h * key.shape[1] // query.shape[1]]
            for i in range(query.shape[2]):
                seen = [j for j in range(i + 1) if window is None or i - j < window]
                scores = [float(query[n, h, i] @ k[j]) / math.sqrt(SIZE) for j in seen]
                if softcap is not None:
                    scores = [softcap * math.tanh(score / softcap) for score in scores]
                total = sum(math.exp(s) for s in scores) + (0.0 if sinks is None else math.exp(float(sinks[h])))
                out[n, h, i] = sum(math.exp(s) / total * v[j] for s, j in zip(scores, seen, strict=True))
    return out


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (torch.randn(ROWS, h, LENGTH, SIZE, generator=generator) * 2 for h in heads)
    return q, k, v


CASES: list[dict[str, Any]] = [
    {"softcap": 1.5, "sinks": None, "window": None},
    {"softcap": None, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]), "window": None},
    {"softcap": 1.5, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]), "window": 4},
    {"softcap": None, "sinks": None, "window": 4},
]


@pytest.mark.parametrize("case", CASES)
def test_prefill_and_decode_are_the_definition(case: dict[str, Any]) -> None:
    """Seven positions at once, then four one by one: the last ones look back past the window."""
    q, k, v = inputs()
    cache = KeyValueCache()
    cache.reset(ROWS, LENGTH)
    cache.begin_prefill(torch.arange(ROWS))
    scaling = SIZE**-0.5
    parts = [cache.attend(0, q[:, :, :7], k[:, :, :7], v[:, :, :7], scaling, **case)]
    for i in range(7, LENGTH):
        cache.begin_decode(torch.full((ROWS,), i))
        parts.append(cache.attend(0, *(x[:, :, i : i + 1] for x in (q, k, v)), scaling, **case))
    torch.testing.assert_close(torch.cat(parts, 2), by_definition(q, k, v, **case), atol=1e-5, rtol=0)


def test_rows_a_few_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores are built, so only as many rows' as there is room for."""
    q, k, v = inputs()
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    whole = score_attention(q, k, v, visible, 0.3, softcap=2.0)
    monkeypatch.setattr(MODULE, "_MAX_SCORES", 2 * HEADS * LENGTH * LENGTH)
    torch.testing.assert_close(score_attention(q, k, v, visible, 0.3, softcap=2.0), whole, atol=1e-6, rtol=0)
