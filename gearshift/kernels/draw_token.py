"""A token drawn from the softmax over a vocabulary that is split over ranks, for processors.

Letters: n rows, V_r this rank's part of the vocabulary, t ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gearshift.kernels import native
from gearshift.kernels.native import tasks
from gearshift.kernels.native.tasks import Task

# Tokens of a block of the compiled functions, as they have it.
BLOCK = 512

_Distribution = tasks.structure("Distribution", "rows i, tokens i, logits p, stats p, sums p, best p")
_Draw = tasks.structure(
    "Draw",
    "rows i, tokens i, ranks i, rank i, first_token i, greedy i, logits p, stats p, sums p, best p, uniforms p, told p",
)


def serves(logits: Tensor) -> bool:
    return native.built() is not None and logits.device.type == "cpu" and logits.dtype == torch.float32


def draw_token(
    logits: Tensor,
    uniforms: Tensor,
    greedy: bool,
    rank: int,
    first_token: int,
    all_gather: Callable[[Tensor], Tensor],
) -> Tensor:
    """logits [n, V_r] fp32, uniforms [n] fp32 in (0, 1) -> [2, n] fp32: ids of the tokens and their log-probs, 0 but on
    the rank that owns the token.

    The token is the first whose probability, with that of those before it, is more than the uniform (`greedy`: the
    first of the most probable ones). `first_token`: the id of this rank's first; all_gather: `[...]` of each rank ->
    `[t, ...]`. Sums are the same whatever the number of threads.
    """
    logits, uniforms = logits.contiguous(), uniforms.contiguous()
    n, tokens = logits.shape
    stats, best = torch.empty(2, n), torch.empty(n, dtype=torch.int64)
    sums, told = torch.empty(n, -(-tokens // BLOCK), dtype=torch.float64), torch.empty(2, n)
    tasks.do(Task("distribution", _Distribution(n, tokens, *map(native.pointer, (logits, stats, sums, best))), n))
    all_stats = all_gather(stats).contiguous()
    pointers = map(native.pointer, (logits, all_stats, sums, best, uniforms, told))
    tasks.do(Task("draw_token", _Draw(n, tokens, len(all_stats), rank, first_token, greedy, *pointers), n))
    return told
