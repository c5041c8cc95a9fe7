"""How each parameter of a model is split over the ranks of a tensor-parallel group.

Letters: t ranks of a group, r one of them.

A layout follows from the architecture's plan (`plans`); embedding and LM head are split over the vocabulary by a rule
of our own. It is a function of names and shapes: no weights, no process group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from gearshift.engine.heads import backbone_of, lm_head_of
from gearshift.engine.plans import Plan, plan_for, style_of
from gearshift.engine.split import Range, Split
from gearshift.errors import UserError

Role = Literal["column", "row", "embedding", "head", "sum", "share", "mean_square", "head_norms", "first"]

# What is computed whole on every rank; where `transformers` gathers, or treats gradients, is not our concern.
_WHOLE_STYLES = {
    "replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj", "local_params", "embedding_rowwise",
    "colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep",
}  # fmt: skip
_COLUMN_STYLES = {"colwise", "packed_colwise", "qkv_colwise"}
_MODULE_ROLES: dict[str, Role] = {
    "moe_tp_experts": "sum", "all_reduce": "sum", "moe_identity_expert": "share",
    "norm_all_heads": "mean_square", "norm_each_head": "head_norms",
}  # fmt: skip
# Layers of which a rank holds whole heads, so that with fewer heads than ranks some hold the same one.
_OF_KEY_HEADS = ("k_proj", "v_proj", "k_norm")


@dataclass(frozen=True)
class TensorParallelLayout:
    """`roles`: module or parameter name -> what it does under tensor parallelism (none: what it does anyway);
    `splits`: parameter name -> its split; `vocabulary`: the range of token ids of each rank.

    Modules: a "column" (a layer split over its outputs) is followed by a "row" (split over its inputs), after which
    the group sums; "sum": the group sums the outputs; "share": what each rank computes whole inside of such a sum;
    "mean_square": a norm over all heads; "head_norms": a norm for each head; "embedding" and "head" are split over the
    vocabulary. A parameter that is "first" counts on the first rank and is 0 on the others.
    """

    tp_size: int
    roles: dict[str, Role]
    splits: dict[str, Split]
    vocabulary: tuple[Range, ...]

    @classmethod
    def of(cls, model: Any, tp_size: int) -> TensorParallelLayout:
        """Raises UserError for heads that do not divide, an architecture without a plan, or an unknown style.

        One rank holds all that is not of the vocabulary whole, and needs no plan.
        """
        config = model.config.get_text_config()
        check_heads(config, tp_size)
        size = lm_head_of(model).weight.shape[0]
        vocabulary = tuple((r * size // tp_size, (r + 1) * size // tp_size) for r in range(tp_size))
        roles, splits = _vocabulary(model, vocabulary)
        if tp_size > 1:
            reading = _Reading(model, _plan(model), tp_size)
            reading.read()
            roles, splits = {**reading.roles, **roles}, {**reading.splits, **splits}
        for name, _ in model.named_parameters():
            splits.setdefault(name, Split())
        return cls(tp_size, roles, splits, vocabulary)


def _plan(model: Any) -> Plan:
    """The architecture's plan with full names (those of a plan are relative to the backbone)."""
    config, backbone = model.config.get_text_config(), backbone_of(model)
    prefix = next(name for name, module in model.named_modules() if module is backbone)
    plan = plan_for(config.model_type, getattr(config, "base_model_tp_plan", None))
    return {f"{prefix}.{pattern}": style for pattern, style in plan.items()}


@dataclass
class _Reading:
    """A plan applied to a model: the roles and splits of what it names."""

    model: Any
    plan: Plan
    tp_size: int
    roles: dict[str, Role] = field(default_factory=dict)
    splits: dict[str, Split] = field(default_factory=dict)

    def read(self) -> None:
        family, found = self.model.config.get_text_config().model_type, False
        for name, module in self.model.named_modules():
            style = style_of(self.plan, name)
            found |= style is not None
            if style is not None and style not in _WHOLE_STYLES and not self._module(name, module, style):
                raise UserError(
                    f"{family}: the parallel style {style!r} of {name} ({type(module).__name__}) is not supported"
                )
        for name, parameter in self.model.named_parameters():
            style = style_of(self.plan, name)
            if style is not None and style not in _WHOLE_STYLES and not self._parameter(name, parameter, style):
                raise UserError(f"{family}: the parallel style {style!r} of the parameter {name} is not supported")
        if not found:
            raise UserError(
                f"{family}: its tensor-parallel plan names no layer of {type(self.model).__name__} "
                f"({', '.join(list(self.plan)[:2])} ...)"
            )

    def _module(self, name: str, module: Any, style: str) -> bool:
        """Whether the style could be applied."""
        if style in _MODULE_ROLES:
            self.roles[name] = _MODULE_ROLES[style]
            if style == "norm_all_heads":
                self.splits[f"{name}.weight"] = self._cut(name, style, 0, module.weight.shape[0])
            return True
        if not is_plain_linear(module) or style not in (*_COLUMN_STYLES, "rowwise"):
            return False
        self.roles[name] = "row" if style == "rowwise" else "column"
        transposed = isinstance(module, Conv1D)
        dim = int((self.roles[name] == "row") != transposed)
        self.splits[f"{name}.weight"] = self._cut(name, style, dim, module.weight.shape[dim])
        if module.bias is not None and self.roles[name] == "column":
            self.splits[f"{name}.bias"] = self._cut(name, style, 0, module.bias.shape[0])
        return True

    def _parameter(self, name: str, parameter: nn.Parameter, style: str) -> bool:
        """Whether the style could be applied."""
        if style == "bias_after_sum":
            self.roles[name] = "first"
        elif style in ("colwise", "packed_colwise", "rowwise", "packed_rowwise"):
            last = parameter.dim() - 1
            dim = max(0, last - 1) if style in _COLUMN_STYLES else last
            # Of a head it has one row, or nothing to do with heads.
            self.splits[name] = self._cut(name.removesuffix(".weight"), style, dim, parameter.shape[dim], head=1)
        else:
            return False
        return True

    def _cut(self, name: str, style: str, dim: int, size: int, head: int | None = None) -> Split:
        """A layer's split: its `size` outputs (or inputs) are dimension `dim`.

        `head`: how many of them make a head (None: as many as the attention says).
        """
        t = self.tp_size
        if style.startswith("packed"):
            return Split.packed(dim, [(size // 2, even(size // 2, t, name))] * 2)
        if style == "qkv_colwise":
            head = self._head(name)
            query = self.model.config.get_text_config().num_attention_heads * head
            key = (size - query) // 2
            return Split.packed(dim, [(query, even(query, t, name)), *[(key, whole_heads(key, t, head, name))] * 2])
        if name.rpartition(".")[2] in _OF_KEY_HEADS:
            return Split.plain(dim, whole_heads(size, t, head or self._head(name), name))
        return Split.plain(dim, even(size, t, name))

    def _head(self, name: str) -> int:
        """Size of a head of the attention that a layer belongs to."""
        owner, _, layer = name.rpartition(".")
        attention, config = self.model.get_submodule(owner), self.model.config.get_text_config()
        value_head = getattr(attention, "v_head_dim", None) if layer == "v_proj" else None
        head = value_head or getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
        return int(head or config.hidden_size // config.num_attention_heads)


def is_plain_linear(module: nn.Module) -> bool:
    """A linear layer and nothing more (some routers are subclasses that do more)."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def check_heads(config: Any, tp_size: int) -> None:
    """Raises UserError when `tp_size` does not divide the attention heads (or KV heads and it do not divide)."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % tp_size:
        raise UserError(
            f"rollout.tp_size: {tp_size} does not divide the model's {heads} attention heads; "
            f"use one of {[d for d in range(1, heads + 1) if heads % d == 0]}"
        )
    if kv_heads % tp_size and tp_size % kv_heads:
        raise UserError(f"rollout.tp_size: {tp_size} and the model's {kv_heads} key/value heads do not divide")


def _vocabulary(model: Any, ranges: tuple[Range, ...]) -> tuple[dict[str, Role], dict[str, Split]]:
    """Embedding and LM head over the vocabulary, in nearly equal parts (they need not be equal)."""
    roles: dict[str, Role] = {}
    splits: dict[str, Split] = {}
    embedding, head = model.get_input_embeddings(), lm_head_of(model)
    size = ranges[-1][1]
    tied = head.weight is embedding.weight
    for name, module in model.named_modules():
        if module is embedding and isinstance(embedding, nn.Embedding) and embedding.weight.shape[0] == size:
            roles[name], splits[f"{name}.weight"] = "embedding", Split.plain(0, ranges)
        elif module is head:
            roles[name] = "head"
            if not tied:
                splits[f"{name}.weight"] = Split.plain(0, ranges)
            if head.bias is not None:
                splits[f"{name}.bias"] = Split.plain(0, ranges)
    return roles, splits


def even(size: int, tp_size: int, name: str) -> tuple[Range, ...]:
    """Equal parts of the features of a layer."""
    if size % tp_size:
        raise UserError(f"rollout.tp_size: {tp_size} does not divide the {size} features of {name}")
    part = size // tp_size
    return tuple((r * part, (r + 1) * part) for r in range(tp_size))


def whole_heads(size: int, tp_size: int, head: int, name: str) -> tuple[Range, ...]:
    """Equal parts of whole heads of `head` rows; with fewer heads than ranks, ranks share a head and repeat it."""
    heads = size // head
    if heads >= tp_size:
        if heads % tp_size:
            raise UserError(f"rollout.tp_size: {tp_size} does not divide the {heads} key/value heads of {name}")
        return even(size, tp_size, name)
    if tp_size % heads:
        raise UserError(f"rollout.tp_size: {tp_size} and the {heads} key/value heads of {name} do not divide")
    return tuple((r * heads // tp_size * head, (r * heads // tp_size + 1) * head) for r in range(tp_size))
