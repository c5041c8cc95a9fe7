"""What every operation asks of its inputs, as readable errors.

A message with sizes or numbers in it is put together only to be raised: under torch.compile they may be symbols, which
no string can hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_float(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            require(tensor.is_floating_point(), f"{name} must be floating point, got {tensor.dtype}")


def require_shape(shape: Sequence[int], meaning: str, **tensors: Tensor | None) -> None:
    """`meaning` names the dimensions in the message, such as "[B, L], like logprobs"."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != torch.Size(shape):
            raise ValueError(f"{name} must be {list(shape)} ({meaning}), got {list(tensor.shape)}")


def require_device(like: Tensor, name: str, **tensors: Tensor | None) -> None:
    for other, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{other} must be on {like.device}, like {name}, got {tensor.device}")


def require_above(bound: float, **numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and not number > bound:
            raise ValueError(f"{name} must be above {bound}, got {number}")


def require_within(low: float, high: float, **numbers: float) -> None:
    for name, number in numbers.items():
        if not low <= number <= high:
            raise ValueError(f"{name} must be within {low} and {high}, got {number}")


def require_mask(mask: Tensor) -> None:
    require(mask.dtype == torch.bool, f"mask must be bool, True on response tokens, got {mask.dtype}")


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp32, or fp64 where an input is fp64 (so that gradients can be checked numerically)."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32
