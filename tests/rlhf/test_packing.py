"""Sequences that share a row: each whole, in its own positions. What models make of them: test_sft.py."""

from __future__ import annotations

import torch

from gearshift.rlhf.data.batches import collate_text, pack_text
from gearshift.rlhf.data.encoding import IGNORED, Block, Demonstration
from tests.models import SIZES

LONGEST = 24


def rows(count: int) -> list[Demonstration | Block]:
    """Demonstrations of 2 to 24 tokens, with some text among them."""
    from array import array

    g = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return [int(t) for t in torch.randint(0, SIZES["vocab_size"], (length,), generator=g)]

    found: list[Demonstration | Block] = []
    for number in range(count):
        length = int(torch.randint(2, LONGEST + 1, (1,), generator=g))
        if number % 5 == 4:
            found.append(Block(array("i", tokens(length + 1))))
        else:
            asked = int(torch.randint(1, length, (1,), generator=g))
            found.append(Demonstration(tokens(asked), tokens(length - asked)))
    return found


def test_every_sequence_is_in_one_row_with_its_own_positions() -> None:
    given = rows(30)
    batch = pack_text([*given, None], LONGEST)
    assert batch.tokens.shape[1] <= LONGEST
    assert len(batch) <= sum(len(row.shifted()[0]) for row in given) / LONGEST + 4
    found = []
    for row in range(len(batch)):
        starts = (batch.positions[row] == 0).nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], batch.tokens.shape[1]], strict=True):
            assert batch.positions[row, start:end].tolist() == list(range(end - start))
            found.append((batch.tokens[row, start:end].tolist(), batch.targets[row, start:end].tolist()))
    with_loss = sorted(pair for pair in found if any(target != IGNORED for target in pair[1]))
    assert with_loss == sorted(row.shifted() for row in given)
    assert batch.loss_count == collate_text(given).loss_count
    again = pack_text([*given, None], LONGEST)
    assert torch.equal(again.tokens, batch.tokens)


def test_a_sequence_over_the_limit_has_a_row_of_its_own() -> None:
    batch = pack_text([Demonstration([1], [2] * 9), Demonstration([1], [2])], 4)
    assert batch.tokens.shape == (2, 10)
