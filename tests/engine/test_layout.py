"""Layouts read from the plans that `transformers` carries: names and shapes alone, on the meta device."""

from typing import Any

import pytest
import torch

from gearshift.engine.layout import Split, TensorParallelLayout
from gearshift.engine.loading import build_on_meta
from gearshift.errors import UserError
from tests.models import tiny_config

HALVES_32 = ((0, 16), (16, 32))


def meta_model(family: str, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return build_on_meta(AutoModelForCausalLM, tiny_config(family, **more), torch.float32)


def layout_of(family: str, tp_size: int, **more: Any) -> TensorParallelLayout:
    return TensorParallelLayout.of(meta_model(family, **more), tp_size)


def test_llama_with_grouped_queries() -> None:
    """4 query heads and 2 key/value heads of 8 over two ranks: two query heads and their one key head each."""
    layout = layout_of("llama", 2)
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    assert layout.splits[f"{attention}.q_proj.weight"] == Split(0, HALVES_32)
    assert layout.splits[f"{attention}.k_proj.weight"] == Split(0, ((0, 8), (8, 16)))
    assert layout.splits[f"{attention}.v_proj.weight"] == Split(0, ((0, 8), (8, 16)))
    assert layout.splits[f"{attention}.o_proj.weight"] == Split(1, HALVES_32)
    assert layout.splits[f"{mlp}.up_proj.weight"] == Split(0, ((0, 24), (24, 48)))
    assert layout.splits[f"{mlp}.down_proj.weight"] == Split(1, ((0, 24), (24, 48)))
    assert layout.splits["model.norm.weight"] == Split()
    assert layout.roles[f"{attention}.q_proj"] == layout.roles[f"{mlp}.gate_proj"] == "column"
    assert layout.roles[f"{attention}.o_proj"] == layout.roles[f"{mlp}.down_proj"] == "row"


def test_odd_vocabulary_is_split_without_padding() -> None:
    layout = layout_of("llama", 2)
    assert layout.vocabulary == ((0, 65), (65, 131))
    assert layout.splits["model.embed_tokens.weight"] == layout.splits["lm_head.weight"]
    assert layout.splits["lm_head.weight"] == Split(0, ((0, 65), (65, 131)))
    assert layout.splits["lm_head.weight"].shape((131, 32), 1) == (66, 32)
    assert (layout.roles["model.embed_tokens"], layout.roles["lm_head"]) == ("embedding", "head")


def test_fewer_key_heads_than_ranks_are_repeated() -> None:
    """2 key/value heads over 4 ranks: ranks 0 and 1 share the first; queries stay split four ways."""
    layout = layout_of("llama", 4)
    name = "model.layers.0.self_attn"
    for projection in ("k_proj", "v_proj"):
        assert layout.splits[f"{name}.{projection}.weight"] == Split(0, ((0, 8), (0, 8), (8, 16), (8, 16)))
    assert layout.splits[f"{name}.q_proj.weight"] == Split(0, ((0, 8), (8, 16), (16, 24), (24, 32)))
    one_head = layout_of("qwen3", 2)  # one key/value head for all
    assert one_head.splits[f"{name}.k_proj.weight"] == Split(0, ((0, 8), (0, 8)))
    assert one_head.splits[f"{name}.q_norm.weight"] == Split()


def test_biases_follow_their_columns() -> None:
    """A column's bias is cut like its rows; a row's bias is whole, since it is added once, after the sum."""
    layout = layout_of("qwen2", 2)
    assert layout.splits["model.layers.0.self_attn.q_proj.bias"] == Split(0, HALVES_32)
    assert layout.splits["model.layers.0.self_attn.k_proj.bias"] == Split(0, ((0, 8), (8, 16)))
    neox = layout_of("gpt_neox", 2)
    assert neox.splits["gpt_neox.layers.0.attention.dense.weight"] == Split(1, HALVES_32)
    assert neox.splits["gpt_neox.layers.0.attention.dense.bias"] == Split()
    assert neox.splits["gpt_neox.layers.0.mlp.dense_4h_to_h.bias"] == Split()


def test_gpt_neox_fused_qkv_is_cut_between_heads() -> None:
    """Its rows are [head, (q, k, v), 8]: halves are whole heads, two of them, 48 rows."""
    layout = layout_of("gpt_neox", 2)
    name = "gpt_neox.layers.0.attention.query_key_value"
    assert layout.roles[name] == "column"
    assert layout.splits[f"{name}.weight"] == layout.splits[f"{name}.bias"] == Split(0, ((0, 48), (48, 96)))
    assert layout.splits["gpt_neox.embed_in.weight"] == Split(0, ((0, 65), (65, 131)))


def test_tied_embeddings_are_one_parameter_with_both_roles() -> None:
    layout = layout_of("qwen2", 2)
    assert "lm_head.weight" not in layout.splits
    assert layout.splits["model.embed_tokens.weight"] == Split(0, ((0, 65), (65, 131)))
    assert (layout.roles["model.embed_tokens"], layout.roles["lm_head"]) == ("embedding", "head")


def test_a_head_bias_is_split_over_the_vocabulary() -> None:
    layout = layout_of("phi", 2)
    assert layout.splits["lm_head.bias"] == Split(0, ((0, 65), (65, 131)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt_neox", "phi", "cohere", "granite"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_every_parameter_has_a_split_whose_parts_cover_it(family: str, tp_size: int) -> None:
    model = meta_model(family)
    layout = TensorParallelLayout.of(model, tp_size)
    assert set(layout.splits) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        split = layout.splits[name]
        if split.dim is not None:
            assert len(split.ranges) == tp_size
            covered = {i for low, high in split.ranges for i in range(low, high)}
            assert covered == set(range(parameter.shape[split.dim])), name


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match=r"rollout\.tp_size: 3 does not divide the model's 4 attention heads.*1, 2, 4"):
        layout_of("llama", 3)
    with pytest.raises(UserError, match=r"rollout\.tp_size: 4 and the model's 6 key/value heads do not divide"):
        layout_of("llama", 4, num_attention_heads=12, num_key_value_heads=6, hidden_size=96)


def test_features_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"rollout\.tp_size: 2 does not divide the 49 features of model\.layers\.0\.mlp"
    ):
        layout_of("llama", 2, intermediate_size=49)


def test_an_architecture_without_a_plan_is_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", n_embd=32, n_head=4, n_layer=1, vocab_size=131, n_positions=32)
    model = build_on_meta(AutoModelForCausalLM, config, torch.float32)
    with pytest.raises(UserError, match="gpt2: transformers has no tensor-parallel plan"):
        TensorParallelLayout.of(model, 2)


def test_a_star_stands_for_one_part_of_a_name() -> None:
    model = meta_model("llama")
    model.config.base_model_tp_plan = {"layers.*.up_proj": "colwise", "layers.*.mlp.gate_proj": "colwise"}
    layout = TensorParallelLayout.of(model, 2)
    assert layout.splits["model.layers.0.mlp.up_proj.weight"] == Split()
    assert layout.splits["model.layers.0.mlp.gate_proj.weight"].dim == 0


def test_an_unknown_style_is_refused_by_name() -> None:
    model = meta_model("llama")
    model.config.base_model_tp_plan = {**model.config.base_model_tp_plan, "layers.*.mlp.up_proj": "diagonal"}
    with pytest.raises(UserError, match=r"llama: the parallel style 'diagonal' of model\.layers\.0\.mlp\.up_proj"):
        TensorParallelLayout.of(model, 2)
