"""Top-k and top-p over a vocabulary that is split over ranks: which tokens may be drawn.

Letters: n rows, V_r this rank's part of the vocabulary, t ranks of the tensor-parallel group.

As in `transformers`: temperature first, then top-k, then top-p of what top-k kept. Both keep the tokens at or above
a value of the logits, so tokens that tie with the last one kept are kept too, whatever their ids and their rank. The
value comes from what all ranks were told, so all of them cut at the same one.

A rank tells 4·k bytes a row for top-k, and 4 times 1 KiB a row for top-p, whatever the size of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from gearshift.engine.tensor_parallel import TensorParallelGroup

# Probability masses are added as whole multiples of 2^-40 of the largest token's: whole numbers add up to the same
# whatever their order, on a GPU too, and 2^18 tokens stay 2^5 below the largest int64.
_MASS_UNITS = 2.0**40

_BASE, _SHIFTS = 256, (24, 16, 8, 0)


def kept_tokens(logits: Tensor, highest: Tensor, top_k: int | None, top_p: float, group: TensorParallelGroup) -> Tensor:
    """logits [n, V_r] after the temperature, highest [n] of all ranks -> bool [n, V_r].

    `top_k`: the k most probable tokens (None: all). `top_p`: of these, the fewest most probable ones that hold at
    least this part of their probability (1: all).
    """
    kept = torch.ones_like(logits, dtype=torch.bool)
    if top_k is not None:
        kept = logits >= _kth_largest(logits, top_k, group)[:, None]
    if top_p < 1.0:
        masses = torch.exp(logits - highest[:, None]) * kept
        kept = _nucleus(logits, masses, top_p, group)  # never below what top-k kept: there is no mass
    return kept


def _kth_largest(logits: Tensor, k: int, group: TensorParallelGroup) -> Tensor:
    """[n]: the k-th largest of all ranks' logits, from each rank's own k largest."""
    own = logits.topk(min(k, logits.shape[1]), -1, sorted=False).values
    told = group.all_gather(pad(own, (0, k - own.shape[1]), value=-torch.inf))  # [t, n, k]
    return told.transpose(0, 1).flatten(1).topk(k, -1).values[:, -1]


def _nucleus(logits: Tensor, masses: Tensor, top_p: float, group: TensorParallelGroup) -> Tensor:
    """Tokens at or above the largest logit c such that those at or above c hold `top_p` of all masses.

    c is found digit by digit (to the base 256) of its place among all fp32 numbers: the ranks tell the mass that each
    of 256 digits would add, and all go on with the highest digit that reaches `top_p`.
    """
    places = _places(logits)
    units = (masses * _MASS_UNITS).long()
    # c's digits so far, and the mass above all places that begin with them.
    found = above = needed = units.new_zeros(len(logits), 1)
    for shift in _SHIFTS:
        first = shift == _SHIFTS[0]
        # The first digit has the sign in it.
        digits = (places >> shift) + _BASE // 2 if first else (places >> shift) & (_BASE - 1)
        bins = units.new_zeros(len(logits), _BASE).scatter_add_(1, digits.long(), units)
        told = group.all_gather(bins.float()).long().sum(0)  # [n, 256]
        reached = above + told.flip(-1).cumsum(-1).flip(-1)  # mass at or above each digit
        if first:
            needed = (top_p * reached[:, :1].double()).ceil().long()
        # Rounding of what was told may leave even the lowest digit short of what the digit before it reached.
        digit = ((reached >= needed).sum(-1, keepdim=True) - 1).clamp(min=0)
        above = (reached - told).gather(-1, digit)
        found = digit - _BASE // 2 if first else found * _BASE + digit
        units = units.where(digits == digit.int(), 0)
    return places >= found.int()


def _places(logits: Tensor) -> Tensor:
    """int32 in the order of the fp32 numbers, -0 being 0."""
    bits = (logits + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
