"""A model that starts from nothing: its `policy.config`, held against what `transformers` knows of the model type.

`transformers` takes any key and keeps it, so a misspelt one would be ignored; and what it refuses, it refuses with
exceptions of many types. Here each is one line. Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

from gearshift.errors import SettingError, one_line
from gearshift.rlhf.data.vocabulary import rows_needed

# Numbers that must be 1 or more, under the names that families have for them.
SIZES = (
    "vocab_size",
    "hidden_size",
    "n_embd",
    "intermediate_size",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "n_positions",
)
# Older names that `transformers` still turns into `rope_parameters`.
ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")


def new_model_config(fields: dict[str, Any], tokenizer: Any = None) -> Any:
    """A `transformers` config from its fields; vocabulary size and special tokens are the tokenizer's, if it is given.

    Raises SettingError naming policy.config, and the field where one is to blame.
    """
    from transformers import AutoConfig

    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    _check_names(model_type, fields)
    _check_sizes(fields)
    if tokenizer is not None:
        fields = {**_from_tokenizer(tokenizer), **fields}
        needed = rows_needed(tokenizer.get_vocab())
        if fields["vocab_size"] < needed:
            raise SettingError(
                "policy.config.vocab_size", f"{fields['vocab_size']} is smaller than the tokenizer's {needed}"
            )
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # of whatever type the family's own checks raise
        raise SettingError("policy.config", one_line(error)) from error
    _check_heads(config)
    return config


def try_new_model(fields: dict[str, Any]) -> None:
    """Builds the model without its weights, as every rank will: SettingError for what cannot be. Takes seconds."""
    import torch
    from transformers import AutoModelForCausalLM

    from gearshift.engine.loading import build_on_meta

    build_on_meta(AutoModelForCausalLM, new_model_config(fields), torch.float32, "policy.config")


def _from_tokenizer(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": rows_needed(tokenizer.get_vocab()),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _check_names(model_type: Any, fields: Iterable[str]) -> None:
    """The model type, and each field of it, is one that `transformers` has."""
    from transformers import CONFIG_MAPPING

    if model_type is None:
        raise SettingError("policy.config.model_type", "missing: a transformers model type, such as llama")
    if model_type not in CONFIG_MAPPING:
        meant = _meant(str(model_type), CONFIG_MAPPING)
        raise SettingError("policy.config.model_type", f"transformers knows no {model_type!r}{meant}")
    known = _fields_of(CONFIG_MAPPING[model_type])
    for name in fields:
        if name not in known:
            meant = _meant(str(name), known) or f"; it has {', '.join(sorted(known))}"
            raise SettingError(f"policy.config.{name}", f"a {model_type} config has no such field{meant}")


def _fields_of(config_class: Any) -> set[str]:
    names = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    return names | set(ROPE) if "rope_parameters" in names else names


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _check_sizes(fields: dict[str, Any]) -> None:
    for name in SIZES:
        value = fields.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise SettingError(f"policy.config.{name}", f"should be a whole number of at least 1, not {value!r}")


def _check_heads(config: Any) -> None:
    """Equal groups of heads share a key head. No family checks that: the first forward would fail."""
    heads, key_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if key_heads and heads % key_heads:
        raise SettingError(
            "policy.config.num_key_value_heads", f"{key_heads} does not divide num_attention_heads = {heads}"
        )
