"""Heads: what a causal LM does between its last hidden states and a token's log-prob, fused into one operation.

Letters: B rows, S positions, T = selected positions, H hidden, V vocabulary.

The fused operation is bound on the top module, as a forward that calls the backbone and then the head: Cohere,
Granite and Gemma 2 scale or cap the logits after `lm_head`, and ZeRO-3 must see the head as a module of its own to
gather its weight (and only the top module's forward resets ZeRO-3's trace).
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.errors import UserError
from gearshift.kernels import LogProbs, linear_kl, linear_logprob


@dataclass(frozen=True)
class LogitTransform:
    """Logits are `softcap · tanh(scale · (h W + b) / softcap)`; no cap when `softcap` is None."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """Read from a `transformers` config: Cohere multiplies logits, Granite divides them, Gemma 2 caps them."""
        scale = 1.0
        if getattr(config, "logit_scale", None) is not None:
            scale = float(config.logit_scale)
        elif getattr(config, "logits_scaling", None) is not None:
            scale = 1.0 / float(config.logits_scaling)
        cap = getattr(config, "final_logit_softcapping", None)
        return cls(scale, None if cap is None else float(cap))


def backbone_of(model: Any) -> nn.Module:
    """The part of a `transformers` head model that gives hidden states."""
    backbone: nn.Module = model.base_model
    if backbone is model:
        raise UserError(f"{type(model).__name__} has no head of its own; use a causal LM or a sequence classifier")
    return backbone


def lm_head_of(model: Any) -> nn.Linear:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(model).__name__}: the LM head is a {type(head).__name__}; a Linear layer is needed")
    return head


@dataclass(frozen=True)
class Reference:
    """Another model's head and last hidden states `[B, S, H']` of the same tokens, to hold a policy against."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform


def bind_logprob_head(model: Any) -> None:
    """Give a causal LM the forward `(tokens, targets, temperature, entropy, reference, positions)`, all results
    `[B, S]` fp32.

    It gives (log-probs,), or (log-probs, entropy) with `entropy`; with a `reference` (log-probs, the reference's
    log-probs, exact KL to it). With `hidden_states` instead of targets it gives those `[B, S, H]`.
    `positions` are those of packed sequences, see `engine.packing`. Called with none of these the model is what it was.
    Rows are right-padded and the model causal, so no attention mask is needed: what stands after a row's end cannot
    reach the positions before it.
    """
    head = lm_head_of(model)
    transform = LogitTransform.of(model.config)
    own_forward, own_head = model.forward, head.forward

    def head_forward(
        self: nn.Linear,
        hidden: Tensor,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        reference: Reference | None = None,
    ) -> Any:
        if targets is None:
            return own_head(hidden)
        if reference is not None:
            both = linear_kl(
                hidden,
                self.weight,
                reference.hidden.flatten(0, 1),
                reference.weight,
                targets,
                bias=self.bias,
                scale=transform.scale,
                softcap=transform.softcap,
                ref_bias=reference.bias,
                ref_scale=reference.transform.scale,
                ref_softcap=reference.transform.softcap,
                temperature=temperature,
            )
            return both.logprobs, both.ref_logprobs, both.kl
        result = linear_logprob(
            hidden,
            self.weight,
            targets,
            bias=self.bias,
            scale=transform.scale,
            softcap=transform.softcap,
            temperature=temperature,
            entropy=entropy,
        )
        # A plain tuple: DeepSpeed's backward hooks walk tuples and tensors.
        return (result.logprobs, result.entropy) if entropy else (result.logprobs,)

    def forward(
        self: nn.Module,
        input_ids: Tensor | None = None,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        reference: Reference | None = None,
        hidden_states: bool = False,
        positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if targets is None and not hidden_states:
            return own_forward(input_ids=input_ids, **kwargs)
        packed = {} if positions is None else {"position_ids": positions}
        hidden = backbone_of(self)(input_ids=input_ids, use_cache=False, **packed)[0]
        if targets is None:
            return hidden
        flat = head(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), temperature, entropy, reference)
        return tuple(part.view(targets.shape) for part in flat)

    head.forward = types.MethodType(head_forward, head)  # type: ignore[method-assign]
    model.forward = types.MethodType(forward, model)


def value_head_of(model: nn.Module) -> nn.Linear:
    """The one-output linear head of a sequence-classification model (`score`, or `classifier` in some families)."""
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            if head.out_features != 1:
                raise UserError(
                    f"{type(model).__name__}: the head `{name}` has {head.out_features} outputs; a reward model has 1 "
                    "(num_labels: 1)"
                )
            return head
    raise UserError(f"{type(model).__name__} has no linear head named `score` or `classifier`")


def bind_value_head(model: Any) -> None:
    """Give a sequence-classification model the forward `(tokens, positions)` -> values `[B, S]` fp32.

    The head is applied at every position, so that nobody has to guess a row's end from a pad token, and
    `config.reward_bias` (0 when absent) is subtracted.
    """
    head = value_head_of(model)

    def forward(self: nn.Module, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        packed = {} if positions is None else {"position_ids": positions}
        hidden = backbone_of(self)(input_ids=tokens, use_cache=False, **packed)[0]
        values: Tensor = head(hidden)[..., 0].float()
        return values - float(getattr(self.config, "reward_bias", 0.0))

    model.forward = types.MethodType(forward, model)


@torch.no_grad()
def check_head(model: Any, name: str) -> None:
    """Hold the fused head against the model's own forward, with random hidden states in its backbone's place.

    On the host, while the head's weight is whole there; the rest of the model may still be on the meta device. The
    bound is the rounding of the model's own dtype. Raises UserError when the model does more than `LogitTransform`
    says after its backbone, or anything to the tokens before it.
    """
    head, backbone = lm_head_of(model), backbone_of(model)
    tokens = torch.arange(16).reshape(2, 8) * 7919 % head.out_features
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 8, head.in_features, generator=generator).to(head.weight.dtype)
    bias = None if head.bias is None else torch.zeros_like(head.bias, device="cpu") if head.bias.is_meta else head.bias
    seen: list[bool] = []

    def stand_in(input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **_: Any) -> Any:
        seen.append(inputs_embeds is None and input_ids is not None and torch.equal(input_ids, tokens))
        return _hidden_output(hidden)

    # OPT's causal LM calls the decoder inside of its backbone, which gives the same.
    with _replaced(backbone, forward=stand_in), _replaced(model.get_decoder(), forward=stand_in), \
            _replaced(head._parameters, bias=bias):  # fmt: skip
        logits = model(input_ids=tokens, use_cache=False).logits.float()
    if seen != [True]:
        raise UserError(f"{name}: {type(model).__name__} does more than to call its backbone with the tokens")
    targets = tokens.roll(-1, 1)
    own = torch.log_softmax(logits, -1).gather(-1, targets[..., None]).flatten()
    transform = LogitTransform.of(model.config)
    flat, weight = hidden.flatten(0, 1), head.weight
    fused = linear_logprob(
        flat, weight, targets.flatten(), bias=bias, scale=transform.scale, softcap=transform.softcap
    ).logprobs
    gap = (own - fused).abs().max().item()
    bound = max(1.0, logits.abs().max().item()) * (1e-5 if weight.dtype == torch.float32 else 2e-2)
    if not gap <= bound:
        raise UserError(
            f"{name}: the fused log-probs differ from the model's own logits by {gap:.2e} (bound {bound:.2e}); "
            "its head does something that Gearshift does not know"
        )


def _hidden_output(hidden: Tensor) -> Any:
    """What backbones return, with every field that some causal LM reads from it."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    output = MoeModelOutputWithPast(last_hidden_state=hidden)
    output.cross_attentions = output.shared_kv_states = None  # GPT-2, Gemma 4
    return output


@contextmanager
def _replaced(holder: Any, **values: Any) -> Iterator[None]:
    """Some attributes of an object, or entries of a dictionary, replaced for a while."""
    own = holder if isinstance(holder, dict) else holder.__dict__
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            own.pop(name)
        own.update(before)


__all__ = [
    "LogProbs",
    "LogitTransform",
    "Reference",
    "backbone_of",
    "bind_logprob_head",
    "bind_value_head",
    "check_head",
    "lm_head_of",
    "value_head_of",
]
