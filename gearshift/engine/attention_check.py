"""What a model asks of attention, found out before any weight moves.

`transformers` tells an attention function what may be seen by a mask; the rollout attention gets none and goes by the
keywords alone (positions, and `sliding_window`). Here one forward over two tokens runs with a stand-in for attention,
that gets the mask as a rule and holds it against those keywords.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.engine.cache import check_keywords
from gearshift.errors import UserError

_NAME = "gearshift_check"

# Steps of half a power of two and more: a window or chunk of any size hides one of them from a later one.
_POSITIONS = sorted({0, *(2**k for k in range(25)), *(3 * 2**k for k in range(24))})


def check_attention(model: Any, forward: Callable[[Tensor, Tensor], Any], device: torch.device) -> None:
    """`forward(tokens, positions)` runs the model's backbone. Collective over the ranks that hold it.

    Raises UserError for a model that keeps a state beside keys and values, that passes attention something which
    rollouts (or flash-attn, where it is to be used) do not know, or whose masks are neither causal nor a sliding
    window.
    """
    _check_state(model)
    _register()
    seen: list[int] = []
    with _stand_in(model, seen):
        forward(torch.zeros(1, 2, dtype=torch.int64, device=device), torch.arange(2, device=device)[None])
    name = type(model).__name__
    if not seen:
        raise UserError(f"{name}: its attention does not go through transformers' attention interface")
    if len(set(seen)) < len(seen):
        raise UserError(f"{name}: it calls the attention of one layer several times, which rollouts do not support")


def _check_state(model: Any) -> None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    others = kinds - {"full_attention", "sliding_attention"}
    # A class that may keep such a state (Granite 4) has none in a model all of whose layers are attention.
    if others or (model._is_stateful and not kinds):
        raise UserError(
            f"{config.model_type}: layers that keep a state of their own beside keys and values "
            f"({', '.join(sorted(others)) or type(model).__name__}) are not supported in rollouts"
        )


@contextmanager
def _stand_in(model: Any, seen: list[int]) -> Iterator[None]:
    """Every module's attention is the stand-in for a while; `seen` gets the number of each layer that calls it."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [config._attn_implementation for config in configs]
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.attention_seen = seen
    try:
        for config in configs:
            config._attn_implementation = _NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                del module.attention_seen


def _attention(
    module: Any,
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
    """Looks at what it is given, and gives zeros."""
    check_keywords(module, kwargs)
    if not hasattr(module, "layer_idx"):
        raise UserError(f"{type(module).__name__} does not know which layer it is in, which rollouts need")
    module.attention_seen.append(int(module.layer_idx))
    if module.rollout_cache.flash is not None:
        _check_flash(module, query, value, s_aux)
    if attention_mask is not None:
        rule = getattr(attention_mask, "rule", None)
        if rule is None:
            raise UserError(
                f"{type(module).__name__} makes an attention mask of its own, which rollouts do not support"
            )
        _check_rule(module, rule, sliding_window)
    n, heads, length, _ = query.shape
    return query.new_zeros(n, length, heads, value.shape[-1]), None


def _check_flash(module: nn.Module, query: Tensor, value: Tensor, sinks: Tensor | None) -> None:
    size, value_size = query.shape[-1], value.shape[-1]
    for wrong, what in (
        (sinks is not None, "attention sinks"),
        (size != value_size, f"keys of {size} numbers with values of {value_size}"),
        (size > 256, f"heads of {size} numbers (256 at most)"),
    ):
        if wrong:
            name = type(module).__name__
            raise UserError(f"rollout.attention: flash-attn does not know {what}, as {name} has: use sdpa")


def _check_rule(module: nn.Module, rule: Callable[..., Tensor], window: int | None) -> None:
    near = [] if window is None else [window - 1, window, window + 1]
    positions = torch.tensor(sorted({*_POSITIONS, *near}))
    query, key = positions[:, None], positions[None]
    zero = torch.zeros((), dtype=torch.int64)
    age = query - key
    honoured = (age >= 0) & (age < window) if window is not None else age >= 0
    if not torch.equal(torch.as_tensor(rule(zero, zero, query, key)).expand_as(honoured), honoured):
        raise UserError(
            f"{type(module).__name__} (layer {module.layer_idx}): rollouts do not support its attention mask: they "
            "know causal ones, and the sliding windows that a model tells its attention"
        )


def _mask(
    q_length: int, kv_length: int, mask_function: Callable[..., Tensor], device: torch.device, **kwargs: Any
) -> Tensor:
    mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=device)
    mask.rule = mask_function  # type: ignore[attr-defined]
    return mask


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)
