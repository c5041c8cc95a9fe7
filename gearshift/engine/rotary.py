"""The rotary embedding of a family's model file, as one operation where a step of decoding on a GPU asks for it, or
whole sequences on a processor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from gearshift.kernels import native
from gearshift.kernels.rotate_half import rotary

_NAME = "apply_rotary_pos_emb"


def bind_rotary(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces the function of the model's file by one that serves such steps, and calls the file's own for all else.

    Only where the two agree on random numbers: some families turn neighbours in place of halves.
    """
    module = sys.modules[type(model).__module__]
    own = getattr(module, _NAME, None)
    if own is None or hasattr(own, "own") or not _agrees(own, dtype, device, _turned):
        return
    setattr(module, _NAME, _with_steps(own))


def bind_rotary_of_sequences(model: Any) -> None:
    """The same for whole sequences in fp32 on a processor, where the library is there, with their gradients. Single
    positions there keep the file's own, which a recorded step joins by itself (`tape`)."""
    module = sys.modules[type(model).__module__]
    own = getattr(module, _NAME, None)
    if own is None or hasattr(own, "own") or not _agrees(own, torch.float32, torch.device("cpu"), rotary, positions=5):
        return
    setattr(module, _NAME, _with_sequences(own))


def _with_steps(own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        if more or named or torch.is_grad_enabled() or not _is_step(q, k, cos, sin):
            return own(q, k, cos, sin, *more, **named)
        return _turned(q, k, cos, sin)

    apply.own = own  # type: ignore[attr-defined]
    return apply


def _with_sequences(own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        if more or named or not _are_sequences(q, k, cos, sin):
            return own(q, k, cos, sin, *more, **named)
        return rotary(q, k, cos, sin)

    apply.own = own  # type: ignore[attr-defined]
    return apply


def _are_sequences(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """More than one position of every row: q [n, h, S, D], k [n, k, S, D], cos and sin [n or 1, S, D] without
    gradients."""
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape or not native.serves(q, k, cos, sin):
        return False
    rows, _, positions, size = q.shape
    shaped = (k.shape[0], *k.shape[2:]) == (rows, positions, size) and cos.shape[1:] == (positions, size)
    plain = not (cos.requires_grad or sin.requires_grad)
    return shaped and plain and positions > 1 and size % 2 == 0 and cos.shape[0] in (1, rows)


def _is_step(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """One position of every row, on a GPU, in one type: q [n, h, 1, D], k [n, k, 1, D], cos and sin [n or 1, 1, D]."""
    alike = all(x.is_cuda and x.dtype == q.dtype and x.shape[-1] == q.shape[-1] for x in (q, k, cos, sin))
    shaped = q.dim() == k.dim() == 4 and cos.dim() == sin.dim() == 3 and q.shape[2] == k.shape[2] == cos.shape[1] == 1
    return alike and shaped and q.shape[-1] % 2 == 0 and cos.shape[0] in (1, q.shape[0])


def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from gearshift.kernels.rotary_triton import rotary

    query, key = rotary(q[:, :, 0], k[:, :, 0], cos[:, 0], sin[:, 0])
    return query[:, :, None], key[:, :, None]


@torch.no_grad()
def _agrees(
    own: Callable[..., Any], dtype: torch.dtype, device: torch.device, turned: Callable[..., Any], positions: int = 1
) -> bool:
    rng = torch.Generator().manual_seed(0)
    shapes = ((2, 3, positions, 16), (2, 2, positions, 16), (2, positions, 16), (2, positions, 16))
    given = [torch.randn(*shape, generator=rng).to(dtype).to(device) for shape in shapes]
    try:
        found = own(*given)
    except (TypeError, ValueError, RuntimeError, IndexError):  # it takes something else
        return False
    wanted = turned(*given)
    bound = 2 * torch.finfo(dtype).eps
    return len(found) == 2 and all(
        a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=bound, atol=4 * bound)
        for a, b in zip(found, wanted, strict=True)
    )
