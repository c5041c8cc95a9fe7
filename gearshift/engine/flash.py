"""flash-attn, where it is asked for and installed."""

from __future__ import annotations

import torch

from gearshift.engine.settings import check_attention_setting
from gearshift.errors import SettingError
from gearshift.kernels import FlashKernel


def flash_kernel(dtype: torch.dtype, device: torch.device) -> FlashKernel:
    """flash-attn's attention of one new position a row. Raises SettingError where it cannot serve."""
    check_attention_setting("flash", "fp32" if dtype == torch.float32 else "bf16")
    if device.type != "cuda":
        raise SettingError("rollout.attention", f"flash needs a GPU, and this rank computes on {device.type}: use sdpa")
    from flash_attn import flash_attn_with_kvcache

    kernel: FlashKernel = flash_attn_with_kvcache
    return kernel
