"""Tiny random models of several families, saved as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "gpt_neox": {},
    "phi": {},  # a head bias
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.25, "tie_word_embeddings": True},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 4.0},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 6},
}


def tiny_config(family: str, **more: Any) -> Any:
    from transformers import AutoConfig

    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    return AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **special, **more})


def save_tiny(family: str, folder: Path, seed: int = 0, **more: Any) -> Path:
    """A causal LM with weights large enough that its distributions are far from uniform."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder
