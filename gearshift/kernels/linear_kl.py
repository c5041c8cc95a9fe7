"""The exact KL divergence between two heads, KL(policy ‖ reference) per token, without the logits of either.

Letters: T tokens, H and H' hidden, V vocabulary, V_r this rank's part of it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.kernels import checks, linear_kl_cpu
from gearshift.kernels.head import Head
from gearshift.kernels.linear_kl_cpu import KlSlopes, Side, divergence
from gearshift.kernels.linear_logprob import IGNORED, check_head, check_ids, check_targets, compact, log_softmax
from gearshift.kernels.states import Shards


class LinearKL(NamedTuple):
    """`[T]` each, fp32; 0 for ignored targets. None where not asked for: the log-probs without targets."""

    kl: Tensor
    logprobs: Tensor | None
    ref_logprobs: Tensor | None
    entropy: Tensor | None


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ref_bias: Tensor | None = None,
    ref_scale: float = 1.0,
    ref_softcap: float | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
) -> LinearKL:
    """Σ over the vocabulary of p·(log p − log q) per token, differentiable in `hidden`, `weight` and `bias`.

    `hidden [T, H]`, `weight [V_r, H]`, `bias [V_r]` are the policy's, those with `ref_` the reference's, whose hidden
    size may differ and which gets no gradient: bf16, fp16 or fp32. Both heads are as in `linear_logprob`, with one
    temperature. `targets [T]` int64: also the log-probs of these tokens under both; −100: all 0, no gradient,
    whatever the hidden states hold there. `group`, `vocab_start`: as in `linear_logprob`; both heads are split alike.

    A token with p = 0 adds 0; one with p > 0 and q = 0 makes the KL +inf, and then it has no gradient. A policy row
    whose logits are all −inf has no distribution: KL 0.
    Raises ValueError for shapes, dtypes, devices, settings and ids that cannot be, and for shards that do not fit.
    """
    Head(scale, softcap, temperature)
    Head(ref_scale, ref_softcap, temperature)
    _check(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, targets)
    name = None if group is None else group.group_name
    kl, logprobs, ref_logprobs, entropies, _ = torch.ops.gearshift.linear_kl(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, targets, scale, softcap, ref_scale, ref_softcap,
        temperature, entropy, name, vocab_start,
    )  # fmt: skip
    asked = targets is not None
    return LinearKL(kl, logprobs if asked else None, ref_logprobs if asked else None, entropies if entropy else None)


def implementation(hidden: Tensor) -> ModuleType:
    """The module whose `state` and `gradients` serve this device."""
    if hidden.is_cuda:
        from gearshift.kernels import linear_kl_triton

        return linear_kl_triton
    return linear_kl_cpu


def plain(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ref_bias: Tensor | None = None,
    ref_scale: float = 1.0,
    ref_softcap: float | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
) -> LinearKL:
    """What `linear_kl` means, over the whole vocabulary, by autograd: builds the logits of both. fp64 stays fp64."""
    _check(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, targets)
    rows = _rows(targets, hidden)
    logp, dead = log_softmax(hidden[rows], weight, bias, Head(scale, softcap, temperature))
    with torch.no_grad():
        logq, ref_dead = log_softmax(ref_hidden[rows], ref_weight, ref_bias, Head(ref_scale, ref_softcap, temperature))
        logq = logq.masked_fill(ref_dead[:, None], -torch.inf).to(logp.dtype)
    p = logp.exp().masked_fill(dead[:, None], 0.0)
    zeros = logp.new_zeros(hidden.shape[0])

    def spread(values: Tensor) -> Tensor:
        return zeros.index_copy(0, rows, values)

    finite = logp.masked_fill(p == 0, 0.0)  # p = 0 adds 0
    kl = (p * (finite - logq.masked_fill(p == 0, 0.0))).sum(dim=1)
    entropies = spread(-(p * finite).sum(dim=1)) if entropy else None
    if targets is None:
        return LinearKL(spread(kl), None, None, entropies)
    chosen = targets[rows, None]
    logprobs = logp.gather(1, chosen)[:, 0].masked_fill(dead, -torch.inf)
    return LinearKL(spread(kl), spread(logprobs), spread(logq.gather(1, chosen)[:, 0]), entropies)


def _rows(targets: Tensor | None, hidden: Tensor) -> Tensor:
    """The tokens that are not ignored."""
    if targets is None:
        return torch.arange(hidden.shape[0], device=hidden.device)
    return (targets != IGNORED).nonzero()[:, 0]


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    targets: Tensor | None,
) -> None:
    check_head(hidden, weight, bias)
    check_head(ref_hidden, ref_weight, ref_bias, "ref_")
    checks.require_device(hidden, "hidden", ref_hidden=ref_hidden)
    for name, ours, theirs in (
        ("hidden", hidden.shape[0], ref_hidden.shape[0]),
        ("weight", weight.shape[0], ref_weight.shape[0]),
    ):
        checks.require(
            ours == theirs, f"ref_{name} must have {ours} rows, like {name}, got {theirs}: same tokens, same vocabulary"
        )
    if targets is not None:
        check_targets(targets, hidden)


# --- operators of torch.library: torch.compile and fake tensors pass through -----------------------------------------

_HEADS = "float scale, float? softcap, float ref_scale, float? ref_softcap, float temperature"
_TENSORS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, "
    "Tensor? targets"
)


@torch.library.custom_op(
    "gearshift::linear_kl",
    mutates_args=(),
    schema=f"({_TENSORS}, {_HEADS}, bool entropy, str? group, int vocab_start) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Tensor, ref_weight: Tensor,
    ref_bias: Tensor | None, targets: Tensor | None, scale: float, softcap: float | None, ref_scale: float,
    ref_softcap: float | None, temperature: float, entropy: bool, group: str | None, vocab_start: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """KL, log-probs, reference log-probs and entropies [T], and the tokens' states [T, 8] for the backward."""
    rows = _rows(targets, hidden)
    policy = Side(compact(hidden, rows), weight, bias, Head(scale, softcap, temperature))
    reference = Side(compact(ref_hidden, rows), ref_weight, ref_bias, Head(ref_scale, ref_softcap, temperature))
    chosen = rows.new_empty(0) if targets is None else targets[rows]
    check_ids(chosen, weight.shape[0], group, vocab_start)
    # Without targets every one is "in no part of the vocabulary".
    local = torch.full_like(rows, -1) if targets is None else chosen - vocab_start
    state = implementation(hidden).state(policy, reference, local, entropy)
    state = Shards(group, vocab_start, weight.shape[0]).merge(state, chosen)
    top, total, numerator, target, ref_top, ref_total, ref_target, _ = state.unbind(1)
    dead = total == 0
    found = [
        divergence(state),
        (target - top - total.log()).masked_fill(dead, -torch.inf),
        (ref_target - ref_top - ref_total.log()).masked_fill(ref_total == 0, -torch.inf),
        (total.log() - numerator / total).masked_fill(dead, 0.0),
        state,
    ]
    return tuple(v.new_zeros(hidden.shape[0], *v.shape[1:]).index_copy_(0, rows, v) for v in found)


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Tensor, ref_weight: Tensor, *_: Any) -> Any:
    dtype, tokens = checks.accumulation_dtype(hidden, weight, bias, ref_hidden, ref_weight), hidden.shape[0]
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in (*([(tokens,)] * 4), (tokens, 8)))


@torch.library.custom_op(
    "gearshift::linear_kl_backward",
    mutates_args=(),
    schema=f"(Tensor? grad_kl, Tensor? grad_logprobs, Tensor? grad_entropy, {_TENSORS}, Tensor state, {_HEADS}, "
    "str? group, int vocab_start, bool[] wanted) -> Tensor[]",
)
def _backward(
    grad_kl: Tensor | None, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, ref_hidden: Tensor, ref_weight: Tensor, ref_bias: Tensor | None, targets: Tensor | None,
    state: Tensor, scale: float, softcap: float | None, ref_scale: float, ref_softcap: float | None,
    temperature: float, group: str | None, vocab_start: int, wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias, those that are `wanted`."""
    rows = _rows(targets, hidden)
    policy = Side(compact(hidden, rows), weight, bias, Head(scale, softcap, temperature))
    reference = Side(compact(ref_hidden, rows), ref_weight, ref_bias, Head(ref_scale, ref_softcap, temperature))
    grads = [None if grad is None else grad[rows] for grad in (grad_kl, grad_logprobs, grad_entropy)]
    slopes = KlSlopes.of(state[rows], policy.head.slope, *grads)
    local = torch.full_like(rows, -1) if targets is None else targets[rows] - vocab_start
    dx, dweight, dbias = implementation(hidden).gradients(policy, reference, local, slopes, tuple(wanted))
    if dx is not None:
        dx = Shards(group, vocab_start, weight.shape[0]).sum(dx).to(hidden.dtype)
        dx = torch.zeros_like(hidden).index_copy_(0, rows, dx)
    return [gradient for gradient in (dx, dweight, dbias) if gradient is not None]


@_backward.register_fake
def _(
    grad_kl: Tensor | None, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(t) for t, w in zip((hidden, weight, bias), rest[-1], strict=True) if w and t is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, softcap, ref_scale, ref_softcap, temperature, _, group, vocab_start = inputs
    ctx.save_for_backward(*tensors, output[4])  # the weights as themselves: see `linear_logprob`
    ctx.settings = (scale, softcap, ref_scale, ref_softcap, temperature, group, vocab_start)
    ctx.mark_non_differentiable(output[2], output[4])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_kl: Tensor | None, grad_logprobs: Tensor | None, _: Any, grad_entropy: Tensor | None, __: Any
) -> tuple[Any, ...]:
    if grad_kl is None and grad_logprobs is None and grad_entropy is None:
        return (None,) * 15
    wanted = list(ctx.needs_input_grad[:3])
    found = iter(
        torch.ops.gearshift.linear_kl_backward(
            grad_kl, grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.settings, wanted
        )
    )
    return (*(next(found) if w else None for w in wanted), *(None,) * 12)


_forward.register_autograd(_differentiate, setup_context=_save)
