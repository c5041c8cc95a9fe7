"""Rows padded into the tensors that training reads.

Letters: B rows, K answers to a prompt, S longest sequence, P longest prompt. Everything is right-padded with token 0.
A row may be None: it lets a rank that has no rows take part in the others' collectives, and bears no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gearshift.engine.batches import Prompts, Rows, TokenBatch
from gearshift.rlhf.data.encoding import IGNORED, Block, Comparison, Demonstration, PromptRow


@dataclass(frozen=True)
class ComparisonBatch(Rows):
    """Prompts with ranked answers, one row per prompt, so that all its pairs are one batch element.

    `tokens [B, K, S]` int64: prompt and answer as one sequence, EOS included; `lengths [B, K]` int64, 0 where a prompt
    has fewer answers; `ranks [B, K]` fp32, the lower the better; `margins [B]` fp32, 0 but for pairs that have one.
    """

    tokens: Tensor
    lengths: Tensor
    ranks: Tensor
    margins: Tensor

    def pairs(self) -> Tensor:
        """`[B, K, K]` bool: answer i was preferred to answer j. Ties make no pair."""
        present = self.lengths > 0
        return (self.ranks[:, :, None] < self.ranks[:, None, :]) & present[:, :, None] & present[:, None, :]

    @property
    def sizes(self) -> Tensor:
        return self.lengths.sum(1).clamp(min=1)

    @property
    def loss_count(self) -> Tensor:
        """Prompts with at least one pair."""
        return self.pairs().flatten(1).any(1).sum()


def collate_text(rows: Sequence[Demonstration | Block | None]) -> TokenBatch:
    """Demonstrations and blocks of text, which may be mixed in one batch."""
    pairs = [([0], [IGNORED]) if row is None else row.shifted() for row in rows]
    return TokenBatch(
        tokens=_padded([tokens for tokens, _ in pairs], 0),
        targets=_padded([targets for _, targets in pairs], IGNORED),
    )


def collate_prompts(
    rows: Sequence[PromptRow | None], draws: Sequence[int] | None = None, samples: Sequence[int] | None = None
) -> Prompts:
    """Prompts to answer. `draws` are the sampler's; without them (evaluation) they are the row numbers.

    `samples`: which answer to its draw each row is; without them the first of each.
    """
    ids = [-1 if row is None else row.id for row in rows]
    tokens = [[0] if row is None else row.tokens for row in rows]
    return Prompts(
        tokens=_padded(tokens, 0),
        lengths=torch.tensor([len(row) for row in tokens]),
        ids=torch.tensor(ids),
        draws=torch.tensor([max(row, 0) for row in ids] if draws is None else list(draws)),
        samples=torch.tensor([0] * len(rows) if samples is None else list(samples), dtype=torch.int64),
    )


def collate_comparisons(rows: Sequence[Comparison | None]) -> ComparisonBatch:
    """Prompts with their ranked answers; K is the most answers that a prompt of the batch has."""
    texts = [[] if row is None else [row.prompt + completion for completion in row.completions] for row in rows]
    answers = max(1, *map(len, texts)) if texts else 1
    longest = max([1, *(len(text) for row in texts for text in row)])
    tokens = torch.zeros(len(rows), answers, longest, dtype=torch.int64)
    lengths = torch.zeros(len(rows), answers, dtype=torch.int64)
    ranks = torch.zeros(len(rows), answers)
    for b, row in enumerate(rows):
        for k, text in enumerate(texts[b]):
            tokens[b, k, : len(text)] = torch.tensor(text)
            lengths[b, k] = len(text)
        if row is not None:
            ranks[b, : len(row.ranks)] = torch.tensor(row.ranks)
    margins = torch.tensor([0.0 if row is None else row.margin for row in rows])
    return ComparisonBatch(tokens, lengths, ranks, margins)


def _padded(rows: Sequence[list[int]], pad: int) -> Tensor:
    """`[B, S]` int64."""
    padded = torch.full((len(rows), max(map(len, rows), default=0)), pad, dtype=torch.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return padded
