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
    "gemma2": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 2.0,
        "sliding_window": 6,
    },
}

# Two layers: one with a window, one without.
WINDOWS: dict[str, Any] = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Beside those above, for what depends on the architecture alone.
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 2, "sliding_window": 6},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False, **WINDOWS},
    "phi3": {"num_key_value_heads": 2, "sliding_window": 6},
    "gpt2": {"tie_word_embeddings": False},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48, "tie_word_embeddings": False},
    "cohere2": {"num_key_value_heads": 2, **WINDOWS},
    "olmo": {"num_key_value_heads": 2, "clip_qkv": 0.3},
    "olmo2": {"num_key_value_heads": 2},
    "olmo3": {"num_key_value_heads": 2, **WINDOWS},
    "starcoder2": {"num_key_value_heads": 2, "sliding_window": 6, "tie_word_embeddings": False},
    "stablelm": {"num_key_value_heads": 2, "qk_layernorm": True},
    "smollm3": {"num_key_value_heads": 2, "no_rope_layers": [1, 0], "tie_word_embeddings": False},
    "glm": {"num_key_value_heads": 2, "head_dim": 8},
    "glm4": {"num_key_value_heads": 2, "head_dim": 8},
    "ernie4_5": {"num_key_value_heads": 2, "use_bias": True},
    "helium": {"num_key_value_heads": 4, "head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "seed_oss": {"num_key_value_heads": 2, "head_dim": 8},
    "exaone4": {"num_key_value_heads": 2, **WINDOWS},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, **EXPERTS, "sliding_window": 6},
    "qwen2_moe": {"num_key_value_heads": 2, "num_experts": 4, **EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 12, **EXPERTS},
    "olmoe": {"num_key_value_heads": 2, "num_experts": 4, **EXPERTS},
    "granitemoehybrid": {
        "num_key_value_heads": 2, "num_local_experts": 4, **EXPERTS, "shared_intermediate_size": 24,
        "layer_types": ["full_attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_expand": 1,
    },
    "gpt_oss": {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, **EXPERTS, **WINDOWS},
    "deepseek_v3": {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
        "num_key_value_heads": 4, "n_routed_experts": 4, **EXPERTS, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}  # fmt: skip


def tiny_config(family: str, **more: Any) -> Any:
    from transformers import AutoConfig

    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    return AutoConfig.for_model(family, **{**SIZES, **{**FAMILIES, **MORE_FAMILIES}[family], **special, **more})


def save_tiny(family: str, folder: Path, seed: int = 0, **more: Any) -> Path:
    """A causal LM with weights large enough that its distributions are far from uniform."""
    import torch
    from transformers import AutoModelForCausalLM

    from gearshift.engine.weights import persistent_buffers

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.any():
                parameter.mul_(4.0)
            else:  # norms and biases, also those that a family keeps for each expert
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for _, buffer in persistent_buffers(model):
            buffer.add_(torch.randn_like(buffer) * 0.1)
    model.save_pretrained(folder)
    return folder
