"""Causal attention (Vaswani et al. 2017, 3.2.1) of sequences that stand one after another, on processors.

Letters: N tokens of all sequences, h query heads, k heads of keys and values, D size of a key, E of a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gearshift.kernels import checks, native

LANES = 16  # numbers of a vector: sizes of heads are multiples of it


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the compiled library can take such heads."""
    sizes = q.shape[-1] % LANES == 0 == v.shape[-1] % LANES and q.shape[-1] == k.shape[-1]
    heads = q.shape[-2] % max(1, k.shape[-2]) == 0 and k.shape[-2] == v.shape[-2]
    return native.serves(q, k, v) and sizes and heads


def causal_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scaling: float) -> Tensor:
    """softmax(scaling · q Kᵀ) V of each token over those of its sequence up to itself; differentiable.

    q `[N, h, D]`, k `[N, k, D]`, v `[N, k, E]`, fp32; `lengths` of the sequences, which add up to N; `scaling` above 0;
    every h / k query heads share a head of keys and values -> `[N, h, E]`. Of `lengths` and the inputs of a sequence
    alone depend its results, to the bit. The library must be there (`serves`).
    """
    checks.require_above(0.0, scaling=scaling)
    checks.require(sum(lengths) == len(q) == len(k) == len(v), f"sequences of {lengths} tokens, {len(q)} queries")
    found: Tensor = _CausalAttention.apply(q, k, v, lengths, scaling)
    return found


def plain(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scaling: float) -> Tensor:
    """The same by operations of torch, sequence by sequence."""
    group = q.shape[1] // k.shape[1]
    parts = []
    for own in zip(*(states.split(lengths) for states in (q, k, v)), strict=True):
        query, key, value = (states.transpose(0, 1) for states in own)
        key, value = (states.repeat_interleave(group, 0) for states in (key, value))
        scores = scaling * (query @ key.transpose(1, 2))
        unseen = scores.new_ones(scores.shape[1:], dtype=torch.bool).triu(1)
        parts.append((scores.masked_fill(unseen, -torch.inf).softmax(-1) @ value).transpose(0, 1))
    return torch.cat(parts)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scaling: float) -> Tensor:
        states = [t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v)]
        out, log_sums = q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[:2])
        starts = torch.tensor([0, *lengths]).cumsum(0)
        if not q.is_meta:
            given = *_given(states, starts, lengths, scaling), *map(native.pointer, (out, log_sums))
            native.spread("causal_attention", _FIELDS + "pp", len(lengths) * k.shape[1], q.numel(), *given)
        ctx.save_for_backward(*states, starts, out, log_sums)
        ctx.settings = lengths, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *states, starts, out, log_sums = ctx.saved_tensors
        lengths, scaling = ctx.settings
        dout = gradients[0].contiguous()
        dq, dk, dv = (dout.new_empty(t.shape) for t in states)
        tensors = out, log_sums, dout, dq, dk, dv
        if not dq.is_meta:
            given = *_given(states, starts, lengths, scaling), *map(native.pointer, tensors)
            tasks = len(lengths) * dk.shape[1]
            native.spread("causal_attention_backward", _FIELDS + "pppppp", tasks, dq.numel(), *given)
        return dq, dk, dv, None, None


_FIELDS = "iiiiidpppp" + "i" * 6


def _given(states: list[Tensor], starts: Tensor, lengths: list[int], scaling: float) -> tuple[Any, ...]:
    q, k, v = states
    sizes = q.shape[1], k.shape[1], q.shape[2], v.shape[2], max(lengths, default=0)
    strides = (n for t in states for n in t.stride()[:2])
    return *sizes, scaling, *map(native.pointer, (starts, *states)), *strides
