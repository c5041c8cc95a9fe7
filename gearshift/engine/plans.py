"""The plan of an architecture: which of its layers are split over a tensor-parallel group, and how.

A plan names modules, or parameters that belong to no layer of their own, relative to the backbone, `*` for a number,
and gives each a style. `transformers` carries plans for most architectures; `PLANS` adds those it has none for, and
replaces what of its plans would compute attention whole on every rank. To support an architecture, add it here: what
is not named is held and computed whole.

Styles, as in `transformers`' `distributed/tensor_parallel.py` (a weight is [outputs, inputs]; Conv1D, transposed, too):
  colwise          outputs split; key and value heads are repeated when there are fewer of them than ranks
  packed_colwise   the same of two matrices in one, [gate | up]
  rowwise          inputs split, the group sums the outputs, then a bias is added
  moe_tp_experts   a module of experts whose own parameters have entries of their own; the group sums its outputs
                   (all_reduce is the same; moe_identity_expert an expert that is whole on every rank)
  replicate        whole (so are the styles that gather after a layer, or concern gradients)
Of a parameter, colwise is its last dimension but one, rowwise its last. Our own:
  qkv_colwise      [queries | keys | values] in one matrix, each split by its heads
  norm_all_heads   an RMS norm over all heads together: the group shares the mean square
  norm_each_head   a module whose `norms` holds a norm for each head
  bias_after_sum   a bias inside of experts: added by the first rank alone
"""

from __future__ import annotations

import re

from gearshift.errors import UserError

Plan = dict[str, str]

ATTENTION: Plan = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
LATENT_ATTENTION: Plan = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.q_b_proj": "colwise",
    "layers.*.self_attn.kv_b_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
MLP: Plan = {
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
SHARED_EXPERTS: Plan = {
    "layers.*.mlp.shared_experts.gate_proj": "colwise",
    "layers.*.mlp.shared_experts.up_proj": "colwise",
    "layers.*.mlp.shared_experts.down_proj": "rowwise",
}
GRANITE_MOE: Plan = {
    **ATTENTION,
    "layers.*.shared_mlp.input_linear": "packed_colwise",
    "layers.*.shared_mlp.output_linear": "rowwise",
}
PACKED_MLP: Plan = {"layers.*.mlp.gate_up_proj": "packed_colwise", "layers.*.mlp.down_proj": "rowwise"}
NORMS_OF_ALL_HEADS: Plan = {
    "layers.*.self_attn.q_norm": "norm_all_heads",
    "layers.*.self_attn.k_norm": "norm_all_heads",
}

# Entries by `model_type`, beside those of `transformers` or in their place.
PLANS: dict[str, Plan] = {
    "gpt2": {
        "h.*.attn.c_attn": "qkv_colwise",
        "h.*.attn.c_proj": "rowwise",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    },
    "opt": {
        "decoder.layers.*.self_attn.q_proj": "colwise",
        "decoder.layers.*.self_attn.k_proj": "colwise",
        "decoder.layers.*.self_attn.v_proj": "colwise",
        "decoder.layers.*.self_attn.out_proj": "rowwise",
        "decoder.layers.*.fc1": "colwise",
        "decoder.layers.*.fc2": "rowwise",
    },
    "phi3": {
        "layers.*.self_attn.qkv_proj": "qkv_colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        **PACKED_MLP,
    },
    "glm": PACKED_MLP,
    "glm4": PACKED_MLP,
    "stablelm": {
        **ATTENTION,
        **MLP,
        "layers.*.self_attn.q_layernorm": "norm_each_head",
        "layers.*.self_attn.k_layernorm": "norm_each_head",
    },
    "hunyuan_v1_dense": {**ATTENTION, **MLP},
    "phimoe": ATTENTION,
    "qwen2_moe": {
        "layers.*.mlp.shared_expert.gate_proj": "colwise",
        "layers.*.mlp.shared_expert.up_proj": "colwise",
        "layers.*.mlp.shared_expert.down_proj": "rowwise",
    },
    "exaone_moe": SHARED_EXPERTS,
    "solar_open": SHARED_EXPERTS,
    "glm4_moe_lite": SHARED_EXPERTS,
    "granitemoe": ATTENTION,
    "granitemoeshared": GRANITE_MOE,
    "granitemoehybrid": GRANITE_MOE,
    "afmoe": {**ATTENTION, **MLP, **SHARED_EXPERTS, "layers.*.self_attn.gate_proj": "colwise"},
    "hunyuan_v1_moe": {
        **ATTENTION,
        "layers.*.mlp.shared_mlp.gate_proj": "colwise",
        "layers.*.mlp.shared_mlp.up_proj": "colwise",
        "layers.*.mlp.shared_mlp.down_proj": "rowwise",
    },
    "deepseek_v3": LATENT_ATTENTION,
    "axk1": LATENT_ATTENTION,
    "youtu": LATENT_ATTENTION,
    # Their norms have a weight for each head.
    "cohere": {
        "layers.*.self_attn.q_norm.weight": "colwise",
        "layers.*.self_attn.k_norm.weight": "colwise",
    },
    "olmo2": {**ATTENTION, **NORMS_OF_ALL_HEADS},
    "olmo3": {**ATTENTION, **NORMS_OF_ALL_HEADS},
    "olmoe": {**ATTENTION, **NORMS_OF_ALL_HEADS},
    "flex_olmo": {**ATTENTION, **NORMS_OF_ALL_HEADS},
    "minimax_m2": {**ATTENTION, **NORMS_OF_ALL_HEADS},
    "gpt_oss": {
        **ATTENTION,
        "layers.*.self_attn.sinks": "colwise",
        # Transposed, [experts, inputs, outputs], gate and up alternating: a plain cut keeps the pairs together.
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.experts.gate_up_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj_bias": "rowwise",
        "layers.*.mlp.experts.down_proj": "colwise",
        "layers.*.mlp.experts.down_proj_bias": "bias_after_sum",
    },
}


def plan_for(model_type: str, own: Plan | None) -> Plan:
    """The plan of an architecture, of which `own` is `transformers`' part (its config's `base_model_tp_plan`).

    Raises UserError where there is none.
    """
    plan = {**(own or {}), **PLANS.get(model_type, {})}
    if not plan:
        raise UserError(
            f"{model_type}: neither transformers nor Gearshift has a tensor-parallel plan for this architecture: add "
            "one to PLANS in gearshift/engine/plans.py, or use rollout.tp_size: 1"
        )
    return plan


def style_of(plan: Plan, name: str) -> str | None:
    """The style of a module or parameter, None for what the plan does not name. A `*` stands for one number."""
    return plan.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name))
