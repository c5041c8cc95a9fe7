"""Models whose attention rollouts cannot do are refused before any weight moves."""

from typing import Any

import pytest
import torch

from gearshift.engine.distributed import World
from gearshift.engine.replica import Replica, rotary_limit
from gearshift.engine.tensor_parallel import TensorParallelGroup
from gearshift.errors import UserError
from tests.models import SIZES, tiny_config

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def replica_of(config: Any) -> Replica:
    return Replica(config, TensorParallelGroup(ALONE, 1), torch.float32, ALONE.device)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3_next": (
        {"num_experts": 4, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
         "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        "qwen3_next: layers that keep a state of their own beside keys and values (linear_attention) are not supported",
    ),
    "doge": ({}, "DogeAttention makes an attention mask of its own"),
    "bloom": ({}, "BloomForCausalLM: its attention does not go through transformers' attention interface"),
    "hrm_text": ({"num_key_value_heads": 4}, "HrmTextForCausalLM: it calls the attention of one layer several times"),
    # Its mask has the window, but its attention is not told.
    "qwen2_moe": (
        {"use_sliding_window": True, "sliding_window": 6, "num_experts": 4},
        "Qwen2MoeAttention (layer 0): rollouts do not support its attention mask",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", list(REFUSED))
def test_what_rollouts_cannot_do_is_refused(family: str) -> None:
    from transformers import AutoConfig

    more, says = REFUSED[family]
    config = AutoConfig.for_model(family, **{**SIZES, "pad_token_id": None, **more})
    with pytest.raises(UserError) as caught:
        replica_of(config)
    assert str(caught.value).startswith(says)


def test_a_keyword_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    own = LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", lambda self, *a, **k: own(self, *a, **{**k, "position_bias": 1}))
    with pytest.raises(UserError, match="LlamaAttention passes position_bias to attention"):
        replica_of(tiny_config("llama"))


def test_the_check_leaves_the_model_as_it_was() -> None:
    replica = replica_of(tiny_config("gemma3_text"))
    assert replica.model.config._attn_implementation == "gearshift_rollout"
    assert not any(hasattr(module, "attention_seen") for module in replica.model.modules())


def test_rows_past_the_original_length_of_a_longrope_model_are_refused() -> None:
    """Past it all frequencies change, those of cached keys too."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 32}  # fmt: skip
    replica = replica_of(tiny_config("phi3", rope_parameters=rope, original_max_position_embeddings=32))
    replica.cache.reset(2, 32)
    with pytest.raises(UserError, match=r"may need 33 positions: past 32 this model's rotary embedding changes"):
        replica.cache.reset(2, 33)
    assert rotary_limit(tiny_config("llama")) is None
    assert rotary_limit(tiny_config("gemma3_text")) is None
