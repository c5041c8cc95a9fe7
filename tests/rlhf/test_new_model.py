"""policy.config: each mistake that `transformers` would swallow, or answer with a stack trace, is one line."""

from typing import Any

import pytest

from gearshift.errors import SettingError
from gearshift.rlhf.new_model import new_model_config, try_new_model
from tests.models import FAMILIES, SIZES
from tests.rlhf.tiny import VOCABULARY, tiny_tokenizer

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_a_new_model_fits_its_tokenizer() -> None:
    config = new_model_config(MODEL, tiny_tokenizer())
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (VOCABULARY, 0, 1)
    assert new_model_config({**MODEL, "vocab_size": 300}, tiny_tokenizer()).vocab_size == 300


@pytest.mark.parametrize("family", FAMILIES)
def test_right_configs_pass(family: str) -> None:
    try_new_model({"model_type": family, **SIZES, **FAMILIES[family]})


def test_other_names_of_a_field_pass() -> None:
    try_new_model({**MODEL, "rope_theta": 500_000.0, "vocab_size": 32})
    assert new_model_config({**MODEL, "rope_theta": 500.0}).rope_parameters["rope_theta"] == 500.0
    config = new_model_config({"model_type": "gpt2", "hidden_size": 32, "n_head": 4, "num_hidden_layers": 1})
    assert (config.n_embd, config.n_layer) == (32, 1)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"vocab_size": 100}, "policy.config.vocab_size: 100 is smaller than the tokenizer's 261"),
        ({"model_type": None}, "policy.config.model_type: missing: a transformers model type, such as llama"),
        ({"model_type": "lama"}, "policy.config.model_type: transformers knows no 'lama'; did you mean llama?"),
        ({"model_type": 3}, "policy.config.model_type: transformers knows no 3"),
        (
            {"num_hiden_layers": 2},
            "policy.config.num_hiden_layers: a llama config has no such field; did you mean num_hidden_layers?",
        ),
        ({"zebra": 2}, "policy.config.zebra: a llama config has no such field; it has architectures, "),
        ({"hidden_size": "big"}, "policy.config.hidden_size: should be a whole number of at least 1, not 'big'"),
        ({"hidden_size": 32.0}, "policy.config.hidden_size: should be a whole number of at least 1, not 32.0"),
        (
            {"num_attention_heads": 0},
            "policy.config.num_attention_heads: should be a whole number of at least 1, not 0",
        ),
        ({"hidden_size": 65}, "policy.config: "),
        ({"rms_norm_eps": "small"}, "policy.config: "),
        (
            {"num_key_value_heads": 3},
            "policy.config.num_key_value_heads: 3 does not divide num_attention_heads = 4",
        ),
    ],
)
def test_what_cannot_be_is_one_line(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingError) as caught:
        new_model_config({**MODEL, **fields}, tiny_tokenizer())
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({**MODEL, "hidden_act": "grelu"}, "policy.config: no llama can be built from it: KeyError: "),
        ({"model_type": "gpt2", "n_embd": 65, "n_head": 4}, "policy.config: no gpt2 can be built from it: "),
        ({"model_type": "vit"}, "policy.config: transformers has no causal language model for vit"),
    ],
)
def test_what_only_the_model_itself_refuses_is_one_line_too(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingError) as caught:
        try_new_model(fields)
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)
