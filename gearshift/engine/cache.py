"""Keys and values of the rollout model, and the attention that reads them.

Letters: n rows decoded at once, T new positions a row, C cached positions, D head size.

The attention is registered with `transformers`' attention interface, so that any model file reads Gearshift's cache
without knowing of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from gearshift.errors import UserError
from gearshift.kernels import Columns, FlashKernel, decode_attention, flash_decode, score_attention

ATTENTION_NAME = "gearshift_rollout"

# Keywords that models pass to attention and that change nothing here.
_HARMLESS = {"position_ids", "cache_position", "is_causal", "use_cache", "output_attentions", "past_key_values"}


class KeyValueCache:
    """One buffer pair a layer, `[rows, kv_heads, capacity, D]`, and where the current forward reads and writes.

    Rows are left-aligned: position p of a row stands in column p. A forward is either a prefill of some rows from
    position 0 (which may go unwritten), or one new position for the first `n` rows.

    `limit`: most positions that a row may have (None: as many as there is memory for); `block`: capacities are
    multiples of it; `flash`: attends in decoding, in place of `scaled_dot_product_attention`. `version` grows whenever
    the buffers go.
    """

    def __init__(self, limit: int | None = None, block: int = 1, flash: FlashKernel | None = None) -> None:
        self.limit, self.block, self.flash, self.version = limit, block, flash, 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.rows = self.capacity = 0
        self._prefill: Tensor | None = None  # rows being filled
        self._columns = Columns(torch.empty(0, dtype=torch.int64))  # where each row's new token goes

    def reset(self, rows: int, capacity: int) -> None:
        """Room for `rows` rows of `capacity` positions; keeps larger buffers. UserError past the limit."""
        if self.limit is not None and capacity > self.limit:
            raise UserError(
                f"a prompt and its answer may need {capacity} positions: past {self.limit} this model's rotary "
                "embedding changes with the length of a row, which rollouts do not support: lower "
                "data.max_prompt_tokens or rollout.max_new_tokens"
            )
        capacity = self.rounded(capacity)
        if rows > self.rows or capacity > self.capacity:
            self._drop(max(rows, self.rows), max(capacity, self.capacity))

    def rounded(self, capacity: int) -> int:
        """The capacity that a cache for so many positions gets."""
        return -(-capacity // self.block) * self.block

    def free(self) -> None:
        self._drop(0, 0)

    def _drop(self, rows: int, capacity: int) -> None:
        self._layers.clear()
        self.rows, self.capacity = rows, capacity
        self.version += 1

    def begin_prefill(self, rows: Tensor) -> None:
        self._prefill = rows

    def begin_scoring(self) -> None:
        """Whole rows from position 0, whose keys and values nobody reads again: nothing is written."""
        self._prefill = torch.empty(0, dtype=torch.int64)

    def begin_decode(self, positions: Tensor, width: int | None = None) -> None:
        """positions [n]: where each of the first n rows gets its new token; see `Columns`."""
        self._prefill, self._columns = None, Columns(positions, width)

    def move(self, sources: Tensor, targets: Tensor, width: int | None = None) -> None:
        """Copy rows, or their first `width` positions, onto others."""
        for keys, values in self._layers.values():
            keys[targets, :, :width] = keys[sources, :, :width]
            values[targets, :, :width] = values[sources, :, :width]

    @property
    def held_bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self._layers.values())

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """query [n, heads, T, D], key and value [n, kv_heads, T, D] -> [n, heads, T, D]; see `score_attention`."""
        if self._prefill is not None:
            width = key.shape[2]
            if len(self._prefill):
                keys, values = self._buffers(layer, key, value)
                keys[self._prefill, :, :width], values[self._prefill, :, :width] = key, value
            if softcap is not None or sinks is not None:
                visible = _window_mask(width, window or width, query.device)[None, None]
                return score_attention(query, key, value, visible, scaling, softcap, sinks)
            mask = None if window is None or window >= width else _window_mask(width, window, query.device)
            grouped = key.shape[1] != query.shape[1]
            return scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        newest = query[:, :, 0], key[:, :, 0], value[:, :, 0], *self._buffers(layer, key, value), self._columns
        if self.flash is not None:
            out = flash_decode(self.flash, *newest, scaling=scaling, window=window, softcap=softcap)
        else:
            out = decode_attention(*newest, scaling=scaling, window=window, softcap=softcap, sinks=sinks)
        return out[:, :, None]

    def _buffers(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._layers:
            self._layers[layer] = (
                key.new_zeros(self.rows, key.shape[1], self.capacity, key.shape[3]),
                value.new_zeros(self.rows, value.shape[1], self.capacity, value.shape[3]),
            )
        return self._layers[layer]


def _window_mask(width: int, window: int, device: torch.device) -> Tensor:
    """True where position i may see j: i - window < j <= i."""
    age = torch.arange(width, device=device)[:, None] - torch.arange(width, device=device)
    return (age >= 0) & (age < window)


def rollout_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`transformers`' attention signature; returns [n, T, heads, D]. UserError for a keyword it cannot honour."""
    check_keywords(module, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    cache: KeyValueCache = module.rollout_cache  # type: ignore[assignment]
    out = cache.attend(int(module.layer_idx), query, key, value, scaling, sliding_window, softcap, s_aux)  # type: ignore[arg-type]
    return out.transpose(1, 2).contiguous(), None


def check_keywords(module: nn.Module, keywords: dict[str, Any]) -> None:
    """UserError for what a model passes to attention and this one does not know."""
    unknown = [name for name, given in keywords.items() if given is not None and name not in _HARMLESS]
    if unknown:
        raise UserError(
            f"{type(module).__name__} passes {', '.join(unknown)} to attention, which rollouts do not support"
        )


def register() -> None:
    """Make the attention known to `transformers` under `ATTENTION_NAME`."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, rollout_attention)
