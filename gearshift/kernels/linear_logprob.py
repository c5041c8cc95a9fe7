"""Hidden states × LM head → log-prob, and entropy, of given tokens, without the [tokens, vocabulary] logits.

Letters: T tokens, H hidden, V vocabulary, V_r this rank's part of it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.kernels import checks, linear_logprob_cpu
from gearshift.kernels.head import Head
from gearshift.kernels.linear_logprob_cpu import Slopes
from gearshift.kernels.states import Shards
from gearshift.kernels.weight_sums import WeightSum, sum_for

IGNORED = -100


class LogProbs(NamedTuple):
    """`logprobs [T]` and `entropy [T]` (None where not asked for), fp32; 0 for ignored targets."""

    logprobs: Tensor
    entropy: Tensor | None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
) -> LogProbs:
    """log softmax(z)[target] per token, differentiable in `hidden`, `weight` and `bias`.

    `hidden [T, H]`, `weight [V_r, H]`, `bias [V_r]`: bf16, fp16 or fp32. `targets [T]` int64, ids in the whole
    vocabulary; −100: log-prob 0, entropy 0, no gradient, whatever `hidden` holds there.
    z = scale·(hidden·weight + bias), then softcap·tanh(z / softcap) if given, then z / temperature.

    Vocabulary-parallel: with `group`, each rank passes the same `hidden` and `targets` and its own rows of the head,
    the first of which is `vocab_start`; shards may be uneven or empty. All ranks get the same results and the whole
    gradient of `hidden`; `weight` and `bias` get theirs locally.

    A row whose logits are all −inf has no distribution: log-prob −inf, entropy 0, no gradient.
    `weight` may be released and gathered again between forward and backward (ZeRO-3): it is saved, never copied.
    Gradients come in the dtype of their input. Raises ValueError for shapes, dtypes, devices, settings and ids that
    cannot be, and for shards that overlap or leave a gap.
    """
    Head(scale, softcap, temperature)
    check_head(hidden, weight, bias)
    check_targets(targets, hidden)
    name = None if group is None else group.group_name
    logprobs, entropies, _ = torch.ops.gearshift.linear_logprob(
        hidden, weight, bias, targets, scale, softcap, temperature, entropy, name, vocab_start
    )
    return LogProbs(logprobs, entropies if entropy else None)


def implementation(hidden: Tensor) -> ModuleType:
    """The module whose `state` and `gradients` serve this device."""
    if hidden.is_cuda:
        from gearshift.kernels import linear_logprob_triton

        return linear_logprob_triton
    return linear_logprob_cpu


def plain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
) -> LogProbs:
    """What `linear_logprob` means, over the whole vocabulary, by autograd: builds the logits. fp64 stays fp64."""
    check_head(hidden, weight, bias)
    check_targets(targets, hidden)
    rows = (targets != IGNORED).nonzero()[:, 0]
    logp, dead = log_softmax(hidden[rows], weight, bias, Head(scale, softcap, temperature))
    chosen = logp.gather(1, targets[rows, None])[:, 0].masked_fill(dead, -torch.inf)
    zeros = logp.new_zeros(targets.shape)
    logprobs = zeros.index_copy(0, rows, chosen)
    if not entropy:
        return LogProbs(logprobs, None)
    terms = logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)  # p = 0 adds 0
    return LogProbs(logprobs, zeros.index_copy(0, rows, -terms.sum(dim=1).masked_fill(dead, 0.0)))


def log_softmax(x: Tensor, weight: Tensor, bias: Tensor | None, head: Head) -> tuple[Tensor, Tensor]:
    """log softmax(z) `[T, V]` by autograd, at least fp32, and which rows `[T]` have no distribution (0 there)."""
    dtype = checks.accumulation_dtype(x, weight, bias)
    product = x.to(dtype) @ weight.to(dtype).T
    z = head.logits(product if bias is None else product + bias.to(dtype))
    dead = (z == -torch.inf).all(dim=1)
    return z.masked_fill(dead[:, None], 0.0).log_softmax(dim=1), dead


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """Shapes, dtypes and devices of one head; `prefix` names a second one's tensors in the messages."""
    h, w, b = (f"{prefix}{name}" for name in ("hidden", "weight", "bias"))
    checks.require_float(**{h: hidden, w: weight, b: bias})
    checks.require(hidden.dim() == 2, f"{h} must be [T, H], got {list(hidden.shape)}")
    checks.require(
        weight.dim() == 2 and weight.shape[1] == hidden.shape[1],
        f"{w} must be [vocabulary rows, {hidden.shape[1]}] to follow {h} {list(hidden.shape)}, "
        f"got {list(weight.shape)}",
    )
    checks.require(weight.dtype == hidden.dtype, f"{w} must be {hidden.dtype}, like {h}, got {weight.dtype}")
    checks.require_shape(weight.shape[:1], f"[vocabulary rows], like {w}", **{b: bias})
    checks.require_device(hidden, h, **{w: weight, b: bias})


def check_targets(targets: Tensor, hidden: Tensor) -> None:
    checks.require(targets.dtype == torch.int64, f"targets must be int64, got {targets.dtype}")
    checks.require_shape(hidden.shape[:1], "[T], like hidden", targets=targets)
    checks.require_device(hidden, "hidden", targets=targets)


def check_ids(targets: Tensor, vocab_rows: int, group: str | None, vocab_start: int) -> None:
    """With a group only the ranks together know where the vocabulary ends: `Shards.merge` looks at that."""
    if not targets.numel():
        return
    low, high = (int(edge) for edge in targets.aminmax())
    first, last = (0, None) if group is not None else (vocab_start, vocab_start + vocab_rows - 1)
    bad = low if low < first else high
    fits = low >= first and (last is None or high <= last)
    upper = "" if last is None else f" and at most {last}"
    checks.require(fits, f"targets must be {IGNORED} or at least {first}{upper}, got {bad}")


def compact(hidden: Tensor, rows: Tensor) -> Tensor:
    """The rows that have a target, so that what the others hold (NaN included) is never read."""
    return (hidden if rows.numel() == hidden.shape[0] else hidden[rows]).contiguous()


# --- operators of torch.library: torch.compile and fake tensors pass through -----------------------------------------

_HEAD = "float scale, float? softcap, float temperature"


@torch.library.custom_op(
    "gearshift::linear_logprob",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {_HEAD}, bool entropy, str? group, "
    "int vocab_start) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, softcap: float | None,
    temperature: float, entropy: bool, group: str | None, vocab_start: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-probs [T], entropies [T] (0 where not asked for), and the tokens' states [T, 4] for the backward."""
    dtype = checks.accumulation_dtype(hidden, weight, bias)
    rows = (targets != IGNORED).nonzero()[:, 0]
    chosen = targets[rows]
    check_ids(chosen, weight.shape[0], group, vocab_start)
    state = implementation(hidden).state(
        compact(hidden, rows), weight, bias, chosen - vocab_start, Head(scale, softcap, temperature), entropy
    )
    state = Shards(group, vocab_start, weight.shape[0]).merge(state, chosen)
    top, total, numerator, target_logit = state.unbind(1)
    dead = total == 0
    zeros = torch.zeros(hidden.shape[0], dtype=dtype, device=hidden.device)
    logprobs = (target_logit - top - total.log()).masked_fill(dead, -torch.inf)
    entropies = (total.log() - numerator / total).masked_fill(dead, 0.0) if entropy else torch.zeros_like(total)
    everywhere = torch.zeros(hidden.shape[0], 4, dtype=dtype, device=hidden.device)
    return (
        zeros.index_copy(0, rows, logprobs),
        zeros.index_copy(0, rows, entropies),
        everywhere.index_copy(0, rows, state),
    )


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype, tokens = checks.accumulation_dtype(hidden, weight, bias), hidden.shape[0]
    one, each, state = (hidden.new_empty(shape, dtype=dtype) for shape in ((tokens,), (tokens,), (tokens, 4)))
    return one, each, state


@torch.library.custom_op(
    "gearshift::linear_logprob_backward",
    mutates_args=(),
    schema="(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
    f"Tensor state, {_HEAD}, str? group, int vocab_start, bool[] wanted) -> Tensor[]",
)
def _backward(
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    targets: Tensor, state: Tensor, scale: float, softcap: float | None, temperature: float, group: str | None,
    vocab_start: int, wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias, those that are `wanted`."""
    given = grad_logprobs, grad_entropy, hidden, weight, bias, targets, state, scale, softcap, temperature
    found = _gradients(*given, group, vocab_start, wanted)
    return [gradient for gradient in found if gradient is not None]


def _gradients(
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    targets: Tensor, state: Tensor, scale: float, softcap: float | None, temperature: float, group: str | None,
    vocab_start: int, wanted: list[bool], **total: WeightSum,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Of hidden, weight and bias, those that are `wanted`, but the weight's where there is a `total` that it joins."""
    head = Head(scale, softcap, temperature)
    rows = (targets != IGNORED).nonzero()[:, 0]
    grads = [None if grad is None else grad[rows] for grad in (grad_logprobs, grad_entropy)]
    slopes = Slopes.of(state[rows], head.slope, *grads)
    dx, dweight, dbias = implementation(hidden).gradients(
        compact(hidden, rows), weight, bias, targets[rows] - vocab_start, head, slopes, tuple(wanted), **total
    )
    if dx is not None:
        dx = Shards(group, vocab_start, weight.shape[0]).sum(dx).to(hidden.dtype)
        dx = torch.zeros_like(hidden).index_copy_(0, rows, dx)
    return dx, dweight, dbias


@_backward.register_fake
def _(
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    *rest: Any,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(t) for t, w in zip((hidden, weight, bias), rest[-1], strict=True) if w and t is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, bias, targets, scale, softcap, temperature, _, group, vocab_start = inputs
    # The weight is saved as itself: under ZeRO-3 its data is released after this forward and gathered before
    # backward, which a view or a copy would not see.
    ctx.save_for_backward(hidden, weight, bias, targets, output[2])
    ctx.settings = (scale, softcap, temperature, group, vocab_start)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, __: Any) -> tuple[Any, ...]:
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * 10
    wanted, (hidden, weight, *_) = list(ctx.needs_input_grad[:3]), ctx.saved_tensors
    total = None if hidden.is_cuda or not wanted[1] else sum_for(weight, hidden)
    if total is not None:
        given = grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.settings, [wanted[0], False, wanted[2]]
        return *_gradients(*given, total=total), *(None,) * 7
    found = iter(
        torch.ops.gearshift.linear_logprob_backward(
            grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.settings, wanted
        )
    )
    return (*(next(found) if w else None for w in wanted), *(None,) * 7)


_forward.register_autograd(_differentiate, setup_context=_save)
