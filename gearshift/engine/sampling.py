"""Sampling a token from a vocabulary that is split over ranks, as a function of its seed and indices.

Letters: n rows, H hidden, V_r this rank's part of the vocabulary, t ranks of the tensor-parallel group.

The uniform of a token depends on (seed, draw number of the prompt in the run, sample, position) and on nothing else:
the same draw gets the same answer whatever the batch, the number of ranks or the tensor-parallel degree, up to
rounding. Ranks exchange one maximum and one sum per row, then the token and its log-prob; never logits. What top-k and
top-p add to that is in `truncation`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gearshift.engine.heads import LogitTransform
from gearshift.engine.stopping import StopStrings
from gearshift.engine.tensor_parallel import TensorParallelGroup
from gearshift.engine.truncation import kept_tokens
from gearshift.errors import UserError
from gearshift.kernels import few_rows_linear
from gearshift.kernels.draw_token import draw_token, serves


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. `temperature` 0 is greedy (log-probs are then those of temperature 1).

    `top_k`: draw from the k most probable tokens (None: all); `top_p`: from the fewest most probable tokens that hold
    this part of the probability (1: all). An answer ends with one of `eos_ids`, with the token that completes one of
    the `stop` strings, or at `max_new_tokens`. Raises UserError for numbers out of range.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...]
    temperature: float = 1.0
    seed: int = 0
    top_k: int | None = None
    top_p: float = 1.0
    stop: StopStrings | None = None

    def __post_init__(self) -> None:
        for name, fits, right in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or above"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None for all tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not fits:
                raise UserError(f"rollout.{name}: should be {right}, not {getattr(self, name)}")


@dataclass(frozen=True)
class HeadShard:
    """This rank's rows of the LM head: `weight [V_r, H]`, `bias [V_r]` or None, first id of its rows."""

    weight: Tensor
    bias: Tensor | None
    vocab_start: int
    transform: LogitTransform


# Rows of a bf16 head that are widened at a time on CPU.
_CHUNK_ROWS = 8192

# splitmix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014), on int64 that wraps around.
_INCREMENT = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def uniforms(seed: int, draws: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
    """One number in (0, 1) for each triple of indices (int64, broadcast): fp32, the middle of one of 2^23 equal parts,
    from a hash of seed and indices."""
    state = torch.full_like(draws, seed)
    for index in (draws, samples, positions):
        state = _splitmix(state + _INCREMENT + index * _MIX_1)
    # 23 bits and a half are exact in fp32: with one more the largest would round to 1.
    top = (state >> 41) & 0x7FFFFF
    return (top.float() + 0.5) * 2.0**-23


def _splitmix(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def logits_of(hidden: Tensor, head: HeadShard) -> Tensor:
    """hidden [n, H] -> this rank's logits [n, V_r] fp32."""
    # In fp32, as in training: rounding the logits to bf16 alone would move log-probs by 0.1 at logits of 30.
    if hidden.dtype == torch.float32:
        logits = few_rows_linear(hidden, head.weight, head.bias)
    else:
        logits = _fp32_product(hidden, head.weight)
        logits = logits if head.bias is None else logits + head.bias.float()
    if head.transform.scale != 1.0:
        logits = logits * head.transform.scale
    if head.transform.softcap is not None:
        logits = torch.tanh(logits / head.transform.softcap) * head.transform.softcap
    return logits


def _fp32_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """`h W^T` of bf16 operands, summed and kept in fp32."""
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    chunks = weight.split(_CHUNK_ROWS)
    return torch.cat([hidden.float() @ chunk.float().t() for chunk in chunks], -1)


def sample_tokens(
    hidden: Tensor,
    head: HeadShard,
    temperature: float,
    uniform: Tensor,
    group: TensorParallelGroup,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """hidden [n, H], uniform [n] -> tokens [n] int64 and their log-probs [n] fp32, the same bits on every rank.

    Log-probs are of the whole softmax, also where `top_k` and `top_p` leave only a part of it to draw from.
    """
    logits = logits_of(hidden, head)
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    if top_k is None and top_p == 1.0 and serves(logits):
        told = draw_token(logits, uniform, temperature == 0.0, group.rank, head.vocab_start, group.all_gather)
    else:
        told = _drawn(logits, head.vocab_start, temperature == 0.0, uniform, group, top_k, top_p)
    told = group.all_reduce(told)
    return told[0].long(), told[1]


def _drawn(
    logits: Tensor,
    vocab_start: int,
    greedy: bool,
    uniform: Tensor,
    group: TensorParallelGroup,
    top_k: int | None,
    top_p: float,
) -> Tensor:
    """What `draw_token` gives, by operations of torch, and from a part of the vocabulary alone if that is asked for."""
    top, best = logits.max(-1)
    # A rank may have no possible token at all: its maximum is −inf, and it has no part in the sum.
    weights = torch.exp(logits - top.clamp(min=torch.finfo(top.dtype).min)[:, None])
    stats = group.all_gather(torch.stack([top, weights.sum(-1)]))  # [t, 2, n]
    tops, sums = stats[:, 0], stats[:, 1]
    highest = tops.amax(0)
    scaled = sums * torch.exp(tops - highest)  # [t, n]: each rank's probability mass, not yet normalised
    if greedy:
        owner, local = tops.argmax(0), best
    else:
        rescale, drawn_from = torch.exp(tops - highest), scaled
        if top_k is not None or top_p < 1.0:
            weights = weights * kept_tokens(logits, highest, top_k, top_p, group)
            drawn_from = group.all_gather(weights.sum(-1)) * rescale
        owner, local = _inverse_cdf(weights, drawn_from, rescale[group.rank], uniform, group.rank)
    chosen = logits.gather(-1, local[:, None])[:, 0] - highest - torch.log(scaled.sum(0))
    mine = owner == group.rank
    told = torch.stack([(local + vocab_start).float(), chosen]) * mine
    return torch.where(mine, told, 0.0)


def _inverse_cdf(weights: Tensor, masses: Tensor, rescale: Tensor, uniform: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The rank [n] that owns the drawn token, and the token's row [n] within this rank's part (if it is the owner)."""
    edges = masses.cumsum(0)
    threshold = uniform * edges[-1]
    owner = (threshold >= edges[:-1]).sum(0)
    before = edges[rank] - masses[rank]
    cumulative = weights.cumsum(-1)
    # Below the last edge, so that rounding never points past the last token that has any probability.
    within = ((threshold - before) / rescale).clamp(min=0.0).minimum(cumulative[:, -1] * (1 - 2.0**-23))
    local = torch.searchsorted(cumulative, within[:, None].nan_to_num(0.0), right=True)[:, 0]
    return owner, local.clamp(max=weights.shape[-1] - 1)
