"""The arithmetic and the bytes that a step cannot do without: what a measured time is held against.

Counted are products with weights (2 flops for each weight and token, 6 with the backward pass), attention (each token
with those before it), and the LM head and the last layer's feed-forward only where a log-prob, a value or a token is
asked for. Not counted is what an implementation adds: padding, activations computed again, norms, softmax, sampling.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

FP32 = 4


@dataclass(frozen=True)
class Work:
    """Of one rank. `bytes`: read from and written to memory; 0 where products alone bound the time."""

    flops: float = 0.0
    bytes: float = 0.0

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time that it takes on a machine of these rates."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def attended(length: float, window: int | None = None) -> float:
    """Pairs of a token and one that it attends to, in a sequence of so many tokens: half of the square."""
    if window is None or length <= window:
        return length**2 / 2
    return window * length - window**2 / 2


def forward_flops(body: float, width: float, length: float, head: float = 0, targets: float = 0) -> float:
    """Of one sequence. `body`: weights of all layers; `width`: of the heads of all layers together; `targets`: tokens
    of which the head, of so many weights, is asked."""
    return 2 * body * length + 4 * width * attended(length) + 2 * head * targets


def decode_flops(body: float, width: float, head: float, positions: float) -> float:
    """Of one token, drawn after so many `positions`."""
    return 2 * (body + head) + 4 * width * positions


def optimizer_bytes(itemsize: int, moments: int = 2, average: bool = False) -> int:
    """That an optimizer step reads and writes for each weight: the fp32 gradient is read; fp32 weight, moments and
    moving average are read and written; the weight itself is written."""
    return FP32 * (1 + 2 * (1 + moments + average)) + itemsize


@dataclass(frozen=True)
class Weights:
    """What a token of a model goes through, of one rank's slices where it holds slices.

    `body`: weights of all layers, of experts those that one token reaches; `stored`: all experts; `trained`: part of
    `body` that has a gradient; `last`: part of it that comes after the last attention (`engine.asked`); `head`: of the
    LM head (0: there is none); `width`: of all heads of a layer; `windows`: how many layers attend to so many tokens
    (None: to all).
    """

    body: float
    stored: float
    trained: float
    last: float
    last_trained: bool
    head: float
    head_trained: bool
    width: float
    windows: Mapping[int | None, int]

    @classmethod
    def of(cls, module: Any, parts: int = 1) -> Weights:
        """Of a `transformers` model, whole, under ZeRO-3, or as one of `parts` of a tensor-parallel group."""
        from torch import nn

        from gearshift.engine.asked import last_feed_forward

        after = last_feed_forward(module)
        last = [] if after is None else [p for p in after.parameters() if len(_shape(p)) == 2]
        config = module.config.get_text_config()
        head = getattr(module.get_output_embeddings(), "weight", None)
        apart = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)} | {id(head)}
        reached = experts_reached(config)
        body = stored = trained = 0.0
        for name, parameter in module.named_parameters():
            if id(parameter) in apart or len(_shape(parameter)) < 2:
                continue
            numel = _numel(parameter)
            used = numel * (reached if ".experts." in name else 1.0)
            body, stored = body + used, stored + numel
            trained += used if parameter.requires_grad else 0.0
        return cls(
            body,
            stored,
            trained,
            sum(map(_numel, last)),
            all(p.requires_grad for p in last),
            0.0 if head is None else _numel(head),
            head is not None and head.requires_grad,
            config.num_attention_heads * _head_size(config) / parts,
            Counter(_windows(config)),
        )

    def attention_flops(self, pairs: Mapping[int | None, float]) -> float:
        """`pairs`: of a token and one that it attends to, by window."""
        return 4 * self.width * sum(layers * pairs[window] for window, layers in self.windows.items())

    def pass_flops(self, lengths: Sequence[int], targets: int, backward: bool) -> float:
        """Of a forward over sequences of these lengths, with the `backward` pass where it is asked for; `targets`: of
        how many tokens an output is asked for."""
        tokens, spared = sum(lengths), self.last * (sum(lengths) - targets)
        attention = self.attention_flops({w: sum(attended(n, w) for n in lengths) for w in self.windows})
        body = 2 * (self.body * tokens - spared)
        forward = body + attention + 2 * self.head * targets
        if not backward:
            return forward
        # The gradient of what went in, of all weights; that of the weights, of those that have one.
        of_weights = 2 * (self.trained * tokens - (spared if self.last_trained else 0.0))
        of_head = 2 * self.head * targets * (2 if self.head_trained else 1)
        return forward + body + of_weights + 2 * attention + of_head

    def prefill(self, prompts: Sequence[int], answers: int, itemsize: int) -> Work:
        """Of different prompts of these lengths, after which so many answers begin."""
        flops = self.pass_flops(prompts, len(prompts), backward=False) + 2 * self.head * (answers - len(prompts))
        return Work(flops, (self.stored + self.head) * itemsize)

    def decode(
        self, prompts: Sequence[int], answers: Sequence[int], slots: int, itemsize: int, position_bytes: float
    ) -> Work:
        """Of all tokens of the answers but each one's first, up to `slots` at once. Every step reads the weights once,
        and the keys and values (`position_bytes` in all layers) of each row that goes on."""
        drawn = [count - 1 for count in answers]
        tokens = sum(drawn)
        if not tokens:
            return Work()
        steps = max(*drawn, ceil(tokens / slots), 1)
        pairs = {
            w: sum(attended(p + n, w) - attended(p, w) for p, n in zip(prompts, drawn, strict=True))
            for w in self.windows
        }
        flops = 2 * (self.body + self.head) * tokens + self.attention_flops(pairs)
        each = min(self.stored, self.body * tokens / steps) + self.head
        layers = sum(self.windows.values())
        cached = sum(n * pairs[window] for window, n in self.windows.items()) / layers
        return Work(flops, steps * each * itemsize + cached * position_bytes)


def experts_reached(config: Any) -> float:
    """The part of a layer's experts that one token goes through; 1 where there are none."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(config, name, None))), None)
    reached = getattr(config, "num_experts_per_tok", None)
    return float(reached / experts) if experts and reached else 1.0


def _head_size(config: Any) -> float:
    if getattr(config, "qk_head_dim", None):  # of keys and of values apart
        return float(config.qk_head_dim + config.v_head_dim) / 2
    return float(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _windows(config: Any) -> list[int | None]:
    """What each layer attends to; None: all."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not kinds:
        return [window] * int(config.num_hidden_layers)
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _shape(parameter: Any) -> Sequence[int]:
    shape: Sequence[int] = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())
