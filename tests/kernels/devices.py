"""Where the Triton kernels are tested: on a GPU where Triton is told not to interpret, else on CPU tensors."""

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

# The two ways to an operation's result: operations on whole tensors (on the CPU), and its Triton kernels.
PATHS = ("torch", "triton")


def device() -> str:
    return "cuda" if os.environ.get("TRITON_INTERPRET") == "0" and torch.cuda.is_available() else "cpu"


def take(path: str, module: ModuleType, kernels: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes `module` dispatch to `kernels` if `path` is "triton". The device to test on."""
    if path == "torch":
        return "cpu"
    monkeypatch.setattr(module, "implementation", lambda mask: kernels)
    return device()
