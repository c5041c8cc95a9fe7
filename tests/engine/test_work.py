"""Flops and bytes of a tiny model, by hand."""

from __future__ import annotations

from typing import Any

import torch

from gearshift.engine import Rollouts, TokenBatch
from gearshift.engine.counting import sequences
from gearshift.engine.work import Weights, Work, attended, experts_reached, optimizer_bytes
from tests.models import tiny_config

# A tiny llama: 2 layers of hidden size 32, 4 heads of 8, 2 of them for keys and values, 48 in the MLP, 131 tokens.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
BODY, LAST, HEAD, HEADS = 2 * LAYER, 3 * 32 * 48, 131 * 32, 32


def weights_of(family: str, **more: Any) -> Weights:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return Weights.of(AutoModelForCausalLM.from_config(tiny_config(family, **more)))


def test_weights_of_a_llama() -> None:
    """Embeddings are looked up and norms are no products: neither is counted; a tied head is."""
    for tied in (False, True):
        found = weights_of("llama", tie_word_embeddings=tied)
        assert (found.body, found.stored, found.trained, found.head) == (BODY, BODY, BODY, HEAD)
        assert (found.last, found.last_trained) == (LAST, True)
        assert (found.width, found.windows) == (HEADS, {None: 2})


def test_a_pass_over_two_sequences() -> None:
    """Of 5 and 3 tokens, of 4 of which the head and what is before it since the last attention are asked."""
    found = weights_of("llama")
    attention = 2 * 4 * HEADS * (5 * 5 / 2 + 3 * 3 / 2)
    forward = 2 * (BODY * 8 - LAST * 4) + attention + 2 * HEAD * 4
    assert found.pass_flops([5, 3], 4, backward=False) == forward
    assert found.pass_flops([5, 3], 4, backward=True) == 3 * forward


def test_frozen_weights_have_no_gradient_of_their_own() -> None:
    """As with adapters: the gradient of what went in alone, 4 flops for each weight."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config("llama")).requires_grad_(False)
    found = Weights.of(model).pass_flops([5], 2, backward=True)
    assert found == 4 * (BODY * 5 - LAST * 3) + 3 * 2 * 4 * HEADS * 5 * 5 / 2 + 4 * HEAD * 2


def test_windows_and_experts() -> None:
    """A window of 6: a sequence of 10 has its half square up to there, and 6 for each token after it."""
    assert (attended(10), attended(4, 6), attended(10, 6)) == (50, 8, 18 + 4 * 6)
    assert weights_of("mistral").windows == {6: 2}
    assert weights_of("gemma2").windows == {6: 1, None: 1}
    mixtral = weights_of("mixtral")
    assert experts_reached(tiny_config("mixtral")) == 0.5  # 2 of 4
    expert = 3 * 32 * 48
    assert mixtral.stored - mixtral.body == 2 * 2 * expert


def test_decoding_reads_the_weights_once_a_step() -> None:
    """Answers of 4 and 2 tokens to prompts of 5 and 3: their first tokens are the prefill's, so 3 steps of 2, 1 and 1
    rows; or 4 steps of one row, with one slot."""
    found = weights_of("llama")
    positions = (8**2 - 5**2) / 2 + (4**2 - 3**2) / 2
    flops = 2 * (BODY + HEAD) * 4 + 2 * 4 * HEADS * positions
    for slots, steps in ((2, 3), (1, 4)):
        work = found.decode([5, 3], [4, 2], slots, itemsize=4, position_bytes=256)
        assert work == Work(flops, steps * (BODY + HEAD) * 4 + positions * 256)
    assert found.decode([5], [1], 1, 4, 256) == Work()
    assert found.prefill([5, 3], 2, 4) == Work(found.pass_flops([5, 3], 2, False), (BODY + HEAD) * 4)


def test_the_larger_of_two_times_bounds_it() -> None:
    assert [Work(100, 10).seconds(flops, 10) for flops in (50, 200)] == [2, 1]


def test_an_optimizer_step_reads_and_writes_its_state() -> None:
    """AdamW: the gradient; weight and two moments, twice; the bf16 weight."""
    assert optimizer_bytes(2) == 4 + 2 * 3 * 4 + 2
    assert optimizer_bytes(4, moments=0, average=True) == 4 + 2 * 2 * 4 + 4


def test_padding_is_not_counted() -> None:
    ignored = -100
    targets = torch.tensor([[ignored, 1, 2, ignored], [ignored, ignored, ignored, 3]])
    assert sequences(TokenBatch(torch.zeros_like(targets), targets)) == ([3, 4], 3)
    one = torch.zeros(2, dtype=torch.int64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rollouts = Rollouts(
        torch.zeros(2, 4, dtype=torch.int64), torch.tensor([4, 2]), one, one, one,
        torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), mask, one.bool(),
    )  # fmt: skip
    assert sequences(rollouts) == ([6, 3], 3)
