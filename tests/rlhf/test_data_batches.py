"""Order, parts and padding."""

from array import array

import pytest
import torch

from gearshift.rlhf.data.batches import collate_comparisons, collate_prompts, collate_text
from gearshift.rlhf.data.encoding import Block, Comparison, Demonstration, PromptRow
from gearshift.rlhf.data.sampling import Sampler, rank_part

PINNED_ORDER = [1, 0, 2, 4, 9, 3, 8, 6, 7, 5]


def test_every_epoch_draws_every_row_once_in_another_order():
    sampler = Sampler(10, 4, seed=1)
    batches = [next(sampler) for _ in range(sampler.steps(epochs=2))]
    rows = [row for batch in batches for row in batch.rows]
    assert len(rows) == 20
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]
    assert rows[:10] != sorted(rows[:10])
    assert [draw for batch in batches for draw in batch.draws] == list(range(20))  # a row met again is another draw


def test_the_last_batch_is_filled_so_no_row_is_left_out():
    sampler = Sampler(10, 4, seed=1)
    assert sampler.steps(epochs=1) == 3
    rows = [row for _ in range(3) for row in next(sampler).rows]
    assert set(rows) == set(range(10))
    assert sampler.position == 12


def test_the_order_depends_on_the_seed_alone():
    """Pinned: another machine or Python must draw the same rows."""
    assert next(Sampler(10, 10, seed=0)).rows == PINNED_ORDER
    assert next(Sampler(10, 10, seed=1)).rows != PINNED_ORDER
    whole = [row for batch in (next(it) for it in [Sampler(12, 6, 3)] for _ in range(4)) for row in batch.rows]
    small = [row for batch in (next(it) for it in [Sampler(12, 2, 3)] for _ in range(12)) for row in batch.rows]
    assert whole == small


def test_ranks_take_contiguous_parts():
    batch = list(range(8))
    assert [rank_part(batch, rank, 4) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match="8 rows does not divide by 3 ranks"):
        rank_part(batch, 0, 3)


def test_text_batches_mix_demonstrations_and_blocks():
    batch = collate_text([Demonstration([5, 6], [7, 0]), Block(array("i", [1, 2, 3])), None])
    assert batch.tokens.tolist() == [[5, 6, 7, 0], [1, 2, 0, 0], [0, 0, 0, 0]]
    # the EOS (0) that ends the answer is a target, the padding (0) is none
    assert batch.targets.tolist() == [[-100, 7, 0, -100], [2, 3, -100, -100], [-100] * 4]
    assert batch.loss_count == 4


def test_prompt_batches_carry_row_and_draw():
    rows = [PromptRow(3, [5], "a", {}), PromptRow(8, [6, 7], "b", {}), None]
    batch = collate_prompts(rows[:2], draws=[100, 101], samples=[2, 3])
    assert batch.tokens.tolist() == [[5, 0], [6, 7]]
    assert (batch.lengths.tolist(), batch.ids.tolist()) == ([1, 2], [3, 8])
    assert (batch.draws.tolist(), batch.samples.tolist()) == ([100, 101], [2, 3])
    assert all(field.dtype == torch.int64 for field in vars(batch).values())
    evaluation = collate_prompts(rows)
    assert (evaluation.draws.tolist(), evaluation.ids.tolist()) == ([3, 8, 0], [3, 8, -1])
    assert evaluation.samples.tolist() == [0, 0, 0]
    assert evaluation.lengths.tolist() == [1, 2, 1]  # a place without a row still has one token to run on


def test_comparison_batches_hold_a_prompt_per_row_and_count_prompts_with_a_pair():
    rows = [
        Comparison([5], [[6, 0], [7, 8, 0], [0]], [1.0, 0.0, 1.0]),
        Comparison([5, 5], [[6, 0], [7, 0]], [1.0, 0.0]),
        Comparison([5], [[6, 0], [7, 0]], [2.0, 2.0]),
        None,
    ]
    batch = collate_comparisons(rows)
    assert batch.tokens.shape == (4, 3, 4)
    assert batch.tokens[0].tolist() == [[5, 6, 0, 0], [5, 7, 8, 0], [5, 0, 0, 0]]
    assert batch.lengths.tolist() == [[3, 4, 2], [4, 4, 0], [3, 3, 0], [0, 0, 0]]
    assert batch.pairs().nonzero().tolist() == [[0, 1, 0], [0, 1, 2], [1, 1, 0]]  # (row, better, worse)
    assert batch.loss_count == 2
    assert batch.select(slice(1, 3)).loss_count == 1
