"""Hidden states × LM head → log-prob, and entropy, of given tokens, without the [tokens, vocabulary] logits.

Letters: T tokens, H hidden, V vocabulary, V_r this rank's part of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.kernels import checks
from gearshift.kernels.head import Head
from gearshift.kernels.linear_logprob_chunked import chunked

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
    gradient of `hidden`; `weight` and `bias` get theirs locally. A target that no rank holds gives NaN.

    A row whose logits are all −inf has no distribution: log-prob −inf, entropy 0, no gradient.
    `weight` may be released and gathered again between forward and backward (ZeRO-3): it is saved, never copied.
    Gradients come in the dtype of their input. Raises ValueError for shapes, dtypes, settings and ids that cannot be.
    """
    head = Head(scale, softcap, temperature)
    _check(hidden, weight, targets, bias)
    rows = (targets != IGNORED).nonzero()[:, 0]
    _check_ids(targets[rows], weight.shape[0], group, vocab_start)
    # The one place that chooses an implementation.
    return LogProbs(*chunked(hidden, weight, bias, targets, rows, head, entropy, group, vocab_start))


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
    _check(hidden, weight, targets, bias)
    rows = (targets != IGNORED).nonzero()[:, 0]
    dtype = checks.accumulation_dtype(hidden, weight, bias)
    product = hidden[rows].to(dtype) @ weight.to(dtype).T
    z = Head(scale, softcap, temperature).logits(product if bias is None else product + bias.to(dtype))
    dead = (z == -torch.inf).all(dim=1)
    logp = z.masked_fill(dead[:, None], 0.0).log_softmax(dim=1)
    chosen = logp.gather(1, targets[rows, None])[:, 0].masked_fill(dead, -torch.inf)
    zeros = torch.zeros(targets.shape, dtype=dtype, device=hidden.device)
    logprobs = zeros.index_copy(0, rows, chosen)
    if not entropy:
        return LogProbs(logprobs, None)
    terms = logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)  # p = 0 adds 0
    return LogProbs(logprobs, zeros.index_copy(0, rows, -terms.sum(dim=1).masked_fill(dead, 0.0)))


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    checks.require_float(hidden=hidden, weight=weight, bias=bias)
    checks.require(hidden.dim() == 2, f"hidden must be [T, H], got {list(hidden.shape)}")
    checks.require(
        weight.dim() == 2 and weight.shape[1] == hidden.shape[1],
        f"weight must be [vocabulary rows, {hidden.shape[1]}] to follow hidden {list(hidden.shape)}, "
        f"got {list(weight.shape)}",
    )
    checks.require(targets.dtype == torch.int64, f"targets must be int64, got {targets.dtype}")
    checks.require_shape(hidden.shape[:1], "[T], like hidden", targets=targets)
    checks.require_shape(weight.shape[:1], "[vocabulary rows], like weight", bias=bias)


def _check_ids(targets: Tensor, vocab_rows: int, group: dist.ProcessGroup | None, vocab_start: int) -> None:
    if not targets.numel():
        return
    low, high = (int(edge) for edge in targets.aminmax())
    # With a group only the ranks together know where the vocabulary ends: an id past it gives NaN there.
    first, last = (0, None) if group is not None else (vocab_start, vocab_start + vocab_rows - 1)
    bad = low if low < first else high
    fits = low >= first and (last is None or high <= last)
    upper = "" if last is None else f" and at most {last}"
    checks.require(fits, f"targets must be {IGNORED} or at least {first}{upper}, got {bad}")
