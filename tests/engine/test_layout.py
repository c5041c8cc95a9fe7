"""Layouts read from the plans that `transformers` carries: names and shapes alone, on the meta device."""

from typing import Any

import pytest
import torch

from gearshift.engine.layout import TensorParallelLayout
from gearshift.engine.loading import build_on_meta
from gearshift.engine.split import Split
from gearshift.errors import UserError
from tests.models import FAMILIES, MORE_FAMILIES, tiny_config

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
    assert layout.splits[f"{attention}.q_proj.weight"] == Split.plain(0, HALVES_32)
    assert layout.splits[f"{attention}.k_proj.weight"] == Split.plain(0, ((0, 8), (8, 16)))
    assert layout.splits[f"{attention}.v_proj.weight"] == Split.plain(0, ((0, 8), (8, 16)))
    assert layout.splits[f"{attention}.o_proj.weight"] == Split.plain(1, HALVES_32)
    assert layout.splits[f"{mlp}.up_proj.weight"] == Split.plain(0, ((0, 24), (24, 48)))
    assert layout.splits[f"{mlp}.down_proj.weight"] == Split.plain(1, ((0, 24), (24, 48)))
    assert layout.splits["model.norm.weight"] == Split()
    assert layout.roles[f"{attention}.q_proj"] == layout.roles[f"{mlp}.gate_proj"] == "column"
    assert layout.roles[f"{attention}.o_proj"] == layout.roles[f"{mlp}.down_proj"] == "row"


def test_odd_vocabulary_is_split_without_padding() -> None:
    layout = layout_of("llama", 2)
    assert layout.vocabulary == ((0, 65), (65, 131))
    assert layout.splits["model.embed_tokens.weight"] == layout.splits["lm_head.weight"]
    assert layout.splits["lm_head.weight"] == Split.plain(0, ((0, 65), (65, 131)))
    assert layout.splits["lm_head.weight"].shape((131, 32), 1) == (66, 32)
    assert (layout.roles["model.embed_tokens"], layout.roles["lm_head"]) == ("embedding", "head")


def test_fewer_key_heads_than_ranks_are_repeated() -> None:
    """2 key/value heads over 4 ranks: ranks 0 and 1 share the first; queries stay split four ways."""
    layout = layout_of("llama", 4)
    name = "model.layers.0.self_attn"
    for projection in ("k_proj", "v_proj"):
        assert layout.splits[f"{name}.{projection}.weight"] == Split.plain(0, ((0, 8), (0, 8), (8, 16), (8, 16)))
    assert layout.splits[f"{name}.q_proj.weight"] == Split.plain(0, ((0, 8), (8, 16), (16, 24), (24, 32)))
    one_head = layout_of("qwen3", 2)  # one key/value head for all
    assert one_head.splits[f"{name}.k_proj.weight"] == Split.plain(0, ((0, 8), (0, 8)))
    assert one_head.splits[f"{name}.q_norm.weight"] == Split()


def test_biases_follow_their_columns() -> None:
    """A column's bias is cut like its rows; a row's bias is whole, since it is added once, after the sum."""
    layout = layout_of("qwen2", 2)
    assert layout.splits["model.layers.0.self_attn.q_proj.bias"] == Split.plain(0, HALVES_32)
    assert layout.splits["model.layers.0.self_attn.k_proj.bias"] == Split.plain(0, ((0, 8), (8, 16)))
    neox = layout_of("gpt_neox", 2)
    assert neox.splits["gpt_neox.layers.0.attention.dense.weight"] == Split.plain(1, HALVES_32)
    assert neox.splits["gpt_neox.layers.0.attention.dense.bias"] == Split()
    assert neox.splits["gpt_neox.layers.0.mlp.dense_4h_to_h.bias"] == Split()


def test_gpt_neox_fused_qkv_is_cut_between_heads() -> None:
    """Its rows are [head, (q, k, v), 8]: halves are whole heads, two of them, 48 rows."""
    layout = layout_of("gpt_neox", 2)
    name = "gpt_neox.layers.0.attention.query_key_value"
    assert layout.roles[name] == "column"
    assert layout.splits[f"{name}.weight"] == layout.splits[f"{name}.bias"] == Split.plain(0, ((0, 48), (48, 96)))
    assert layout.splits["gpt_neox.embed_in.weight"] == Split.plain(0, ((0, 65), (65, 131)))


def test_tied_embeddings_are_one_parameter_with_both_roles() -> None:
    layout = layout_of("qwen2", 2)
    assert "lm_head.weight" not in layout.splits
    assert layout.splits["model.embed_tokens.weight"] == Split.plain(0, ((0, 65), (65, 131)))
    assert (layout.roles["model.embed_tokens"], layout.roles["lm_head"]) == ("embedding", "head")


def test_a_head_bias_is_split_over_the_vocabulary() -> None:
    layout = layout_of("phi", 2)
    assert layout.splits["lm_head.bias"] == Split.plain(0, ((0, 65), (65, 131)))


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_every_parameter_has_a_split_whose_parts_cover_it(family: str, tp_size: int) -> None:
    model = meta_model(family)
    layout = TensorParallelLayout.of(model, tp_size)
    assert set(layout.splits) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        split = layout.splits[name]
        if split.dim is not None:
            assert len(split.ranges) == tp_size
            covered = {i for ranges in split.ranges for low, high in ranges for i in range(low, high)}
            assert covered == set(range(parameter.shape[split.dim])), name


# Beside norms and biases: routers, learned positions, and the latent projections that all heads of DeepSeek share.
WHOLE = ("gate.weight", "router.weight", "down_proj_bias", "wpe.weight", "embed_positions.weight", "q_a_proj.weight",
         "kv_a_proj_with_mqa.weight")  # fmt: skip


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_every_matrix_is_split(family: str) -> None:
    """A plan that forgets a layer, or whose names match none, would hold it whole without a word."""
    model = meta_model(family)
    layout = TensorParallelLayout.of(model, 2)
    whole = [n for n, p in model.named_parameters() if p.dim() > 1 and layout.splits[n].dim is None]
    assert [name for name in whole if not name.endswith(WHOLE)] == []


def test_a_plan_that_names_nothing_is_refused() -> None:
    model = meta_model("llama")
    model.config.base_model_tp_plan = {"blocks.*.up_proj": "colwise"}
    with pytest.raises(UserError, match=r"llama: its tensor-parallel plan names no layer of LlamaForCausalLM"):
        TensorParallelLayout.of(model, 2)


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
    """With more than one rank: one holds everything anyway. The line names the table to extend."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("biogpt", hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=131)
    model = build_on_meta(AutoModelForCausalLM, config, torch.float32)
    says = (
        r"biogpt: neither transformers nor Gearshift has a tensor-parallel plan .* PLANS in gearshift/engine/plans\.py"
    )
    with pytest.raises(UserError, match=says):
        TensorParallelLayout.of(model, 2)
    layout = TensorParallelLayout.of(model, 1)
    assert set(layout.roles.values()) == {"embedding", "head"}


def test_fused_queries_keys_and_values_are_cut_by_heads() -> None:
    """Phi-3: 4 query heads and 2 key/value heads of 8 in one matrix; gate and up in another."""
    layout = layout_of("phi3", 2)
    layer = "model.layers.0"
    qkv = ((0, 16), (32, 40), (48, 56)), ((16, 32), (40, 48), (56, 64))
    assert layout.splits[f"{layer}.self_attn.qkv_proj.weight"] == Split(0, qkv)
    assert layout.splits[f"{layer}.mlp.gate_up_proj.weight"] == Split(0, (((0, 24), (48, 72)), ((24, 48), (72, 96))))
    assert layout.roles[f"{layer}.self_attn.o_proj"] == layout.roles[f"{layer}.mlp.down_proj"] == "row"
    four = layout_of("phi3", 4).splits[f"{layer}.self_attn.qkv_proj.weight"]
    assert four.ranges[1] == ((8, 16), (32, 40), (48, 56))  # ranks 0 and 1 share the first key/value head
    assert four.ranges[2] == ((16, 24), (40, 48), (56, 64))


def test_transposed_weights_are_cut_along_their_own_outputs() -> None:
    """GPT-2's layers hold [inputs, outputs]."""
    layout = layout_of("gpt2", 2)
    layer = "transformer.h.1"
    qkv = ((0, 16), (32, 48), (64, 80)), ((16, 32), (48, 64), (80, 96))
    assert layout.splits[f"{layer}.attn.c_attn.weight"] == Split(1, qkv)
    assert layout.splits[f"{layer}.attn.c_attn.bias"] == Split(0, qkv)
    assert layout.splits[f"{layer}.attn.c_proj.weight"] == Split.plain(0, HALVES_32)
    assert layout.splits[f"{layer}.attn.c_proj.bias"] == Split()
    assert layout.splits["transformer.wpe.weight"] == Split()


def test_experts_are_split_inside_and_their_router_is_whole() -> None:
    """Mixtral: [experts, 2 x 48, 32] and [experts, 32, 48]; the group sums what the experts give."""
    layout = layout_of("mixtral", 2)
    mlp = "model.layers.0.mlp"
    assert layout.roles[f"{mlp}.experts"] == "sum"
    halves = ((0, 24), (48, 72)), ((24, 48), (72, 96))
    assert layout.splits[f"{mlp}.experts.gate_up_proj"] == Split(1, halves)
    assert layout.splits[f"{mlp}.experts.down_proj"] == Split.plain(2, ((0, 24), (24, 48)))
    assert layout.splits[f"{mlp}.gate.weight"] == Split()


def test_transposed_experts_with_biases_and_sinks() -> None:
    """GPT-OSS: [experts, 32, 2 x 48] with gate and up in turn; the last bias counts once; a sink for each head."""
    layout = layout_of("gpt_oss", 2)
    experts = "model.layers.0.mlp.experts"
    assert layout.splits[f"{experts}.gate_up_proj"] == Split.plain(2, ((0, 48), (48, 96)))
    assert layout.splits[f"{experts}.gate_up_proj_bias"] == Split.plain(1, ((0, 48), (48, 96)))
    assert layout.splits[f"{experts}.down_proj"] == Split.plain(1, ((0, 24), (24, 48)))
    assert layout.splits[f"{experts}.down_proj_bias"] == Split()
    assert layout.roles[f"{experts}.down_proj_bias"] == "first"
    assert layout.splits["model.layers.0.self_attn.sinks"] == Split.plain(0, ((0, 2), (2, 4)))


def test_norms_over_all_heads_follow_their_heads() -> None:
    layout = layout_of("olmo2", 4)
    attention = "model.layers.0.self_attn"
    assert layout.roles[f"{attention}.q_norm"] == layout.roles[f"{attention}.k_norm"] == "mean_square"
    assert layout.splits[f"{attention}.k_norm.weight"] == layout.splits[f"{attention}.k_proj.weight"]
    assert layout.splits[f"{attention}.q_norm.weight"] == layout.splits[f"{attention}.q_proj.weight"]


def test_a_norm_with_a_row_for_each_head() -> None:
    layout = layout_of("cohere", 4, use_qk_norm=True)
    name = "model.layers.0.self_attn"
    assert layout.splits[f"{name}.q_norm.weight"] == Split.plain(0, ((0, 1), (1, 2), (2, 3), (3, 4)))
    assert layout.splits[f"{name}.k_norm.weight"] == Split.plain(0, ((0, 1), (0, 1), (1, 2), (1, 2)))


def test_every_style_that_transformers_uses_is_known() -> None:
    """For all causal language models that it has, and for every part that a plan names."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from gearshift.engine import layout

    plans = [
        getattr(CONFIG_MAPPING[name], "base_model_tp_plan", None) or {} for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ]
    styles = {style for plan in plans for style in plan.values()}
    known = {*layout._WHOLE_STYLES, *layout._COLUMN_STYLES, *layout._MODULE_ROLES, "rowwise", "packed_rowwise"}
    # Of layers that keep a state of their own, which are refused for that.
    assert styles - known <= {"embedding_colwise"}


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
