"""How each parameter of a model is split over the ranks of a tensor-parallel group.

Letters: t ranks of a group, r one of them.

A layout is read from the plan that `transformers` carries for an architecture (`base_model_tp_plan` of its config);
embedding and LM head are split over the vocabulary by a rule of our own. It is a function of names and shapes: no
weights, no process group.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from gearshift.engine.heads import backbone_of, lm_head_of
from gearshift.errors import UserError

Role = Literal["whole", "column", "row", "embedding", "head"]
Range = tuple[int, int]

# `transformers`' styles for modules that are computed whole on every rank; the gradient's treatment is not our concern.
_WHOLE_STYLES = {"replicated_with_grad_allreduce"}
_ROLES: dict[str, Role] = {"colwise": "column", "rowwise": "row"}


@dataclass(frozen=True)
class Split:
    """One parameter's split: rank r holds `ranges[r]` of dimension `dim`; `dim` None: every rank holds all."""

    dim: int | None = None
    ranges: tuple[Range, ...] = ()

    def shape(self, whole: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """Shape of the slice that the rank holds."""
        if self.dim is None:
            return whole
        low, high = self.ranges[rank]
        return (*whole[: self.dim], high - low, *whole[self.dim + 1 :])


@dataclass(frozen=True)
class TensorParallelLayout:
    """`roles`: module name -> what it does under tensor parallelism; `splits`: parameter name -> its split;
    `vocabulary`: the range of token ids of each rank.

    A "column" module (a Linear split over its outputs) is followed by a "row" module (split over its inputs), after
    which the group sums. "embedding" and "head" are split over the vocabulary.
    """

    tp_size: int
    roles: dict[str, Role]
    splits: dict[str, Split]
    vocabulary: tuple[Range, ...]

    @classmethod
    def of(cls, model: Any, tp_size: int) -> TensorParallelLayout:
        """Raises UserError for an architecture without a plan, an unknown style, or heads that do not divide."""
        config = model.config.get_text_config()
        plan = _plan(model)
        check_heads(config, tp_size)
        size = lm_head_of(model).weight.shape[0]
        vocabulary = tuple((r * size // tp_size, (r + 1) * size // tp_size) for r in range(tp_size))
        roles, splits = _vocabulary(model, vocabulary)
        for name, module in model.named_modules():
            style = _style(plan, name)
            if style is None or style in _WHOLE_STYLES:
                continue
            if style not in _ROLES or not isinstance(module, nn.Linear):
                raise UserError(
                    f"{config.model_type}: the parallel style {style!r} of {name} ({type(module).__name__}) is not "
                    f"supported yet; supported: {', '.join([*_ROLES, *_WHOLE_STYLES])} on Linear layers"
                )
            roles[name] = _ROLES[style]
            dim = 0 if roles[name] == "column" else 1
            unit = _kv_head_size(config, name, module)
            ranges = _even(module.weight.shape[dim], tp_size, unit, name)
            splits[f"{name}.weight"] = Split(dim, ranges)
            if module.bias is not None and dim == 0:
                splits[f"{name}.bias"] = Split(0, ranges)
        for name, _ in model.named_parameters():
            splits.setdefault(name, Split())
        return cls(tp_size, roles, splits, vocabulary)


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


def _plan(model: Any) -> dict[str, str]:
    """The architecture's plan with full module names (the config's is relative to the backbone)."""
    backbone = backbone_of(model)
    prefix = next(name for name, module in model.named_modules() if module is backbone)
    plan = getattr(model.config.get_text_config(), "base_model_tp_plan", None)
    if not plan:
        raise UserError(f"{model.config.model_type}: transformers has no tensor-parallel plan for this architecture")
    return {f"{prefix}.{pattern}": style for pattern, style in plan.items()}


def _style(plan: dict[str, str], name: str) -> str | None:
    for pattern, style in plan.items():
        if fnmatch.fnmatchcase(name, pattern) and name.count(".") == pattern.count("."):
            return style
    return None


def _vocabulary(model: Any, ranges: tuple[Range, ...]) -> tuple[dict[str, Role], dict[str, Split]]:
    """Embedding and LM head over the vocabulary, in nearly equal parts (they need not be equal)."""
    roles: dict[str, Role] = {}
    splits: dict[str, Split] = {}
    embedding, head = model.get_input_embeddings(), lm_head_of(model)
    size = ranges[-1][1]
    tied = head.weight is embedding.weight
    for name, module in model.named_modules():
        if module is embedding and isinstance(embedding, nn.Embedding) and embedding.weight.shape[0] == size:
            roles[name], splits[f"{name}.weight"] = "embedding", Split(0, ranges)
        elif module is head:
            roles[name] = "head"
            if not tied:
                splits[f"{name}.weight"] = Split(0, ranges)
            if head.bias is not None:
                splits[f"{name}.bias"] = Split(0, ranges)
    return roles, splits


def _kv_head_size(config: Any, name: str, module: nn.Linear) -> int | None:
    """Size of one key/value head for a key or value projection of its own, None for any other layer."""
    kv_heads = getattr(config, "num_key_value_heads", None)
    if kv_heads is None or name.rsplit(".", 1)[-1] not in ("k_proj", "v_proj"):
        return None
    return module.out_features // int(kv_heads)


def _even(size: int, tp_size: int, unit: int | None, name: str) -> tuple[Range, ...]:
    """Equal parts; with fewer key/value heads (of `unit` rows) than ranks, ranks share a head and repeat it."""
    if unit is not None and size // unit < tp_size:
        heads = size // unit
        owner = [r * heads // tp_size for r in range(tp_size)]
        return tuple((h * unit, (h + 1) * unit) for h in owner)
    if size % tp_size:
        raise UserError(f"rollout.tp_size: {tp_size} does not divide the {size} features of {name}")
    part = size // tp_size
    return tuple((r * part, (r + 1) * part) for r in range(tp_size))
