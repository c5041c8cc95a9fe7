"""draw_token against its definition in fp64, whole and split over ranks; bits that know no threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gearshift.kernels import native
from gearshift.kernels.draw_token import draw_token

pytestmark = pytest.mark.skipif(native.built() is None, reason="the compiled library is not there")


def drawn(parts: list[Tensor], uniforms: Tensor, greedy: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens and log-probs by ranks that have these parts of the vocabulary, one after the other."""
    told_by_all: list[Tensor] = []
    for part in parts:
        draw_token(part, uniforms, greedy, 0, 0, lambda stats: (told_by_all.append(stats), stats[None])[1])
    first, found = 0, []
    for rank, part in enumerate(parts):
        found.append(draw_token(part, uniforms, greedy, rank, first, lambda stats: torch.stack(told_by_all)))
        first += part.shape[1]
    told = torch.stack(found)
    assert bool(((told[:, 1] != 0).sum(0) <= 1).all())  # one rank owns the token
    return told.sum(0)[0].long(), told.sum(0)[1]


def some(tokens: int, rows: int = 300) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(tokens)
    return 3 * torch.randn(rows, tokens, generator=rng), torch.rand(rows, generator=rng) * 0.998 + 0.001


@pytest.mark.parametrize("tokens", [1, 2, 17, 511, 512, 513, 5000])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_it_is_the_inverse_of_the_cumulated_softmax(tokens: int, ranks: int) -> None:
    logits, uniforms = some(max(tokens, ranks))
    found, logprobs = drawn([part.contiguous() for part in logits.tensor_split(ranks, -1)], uniforms)
    edges = logits.double().softmax(-1).cumsum(-1)
    # The uniform is between the edges of the token, but for rounding.
    assert (edges.gather(-1, found[:, None])[:, 0] >= uniforms - 1e-6).all()
    before = torch.where(found > 0, edges.gather(-1, (found - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    assert (before <= uniforms + 1e-6).all()
    wanted = logits.double().log_softmax(-1).gather(-1, found[:, None])[:, 0]
    assert (logprobs - wanted).abs().max() <= 2e-6


@pytest.mark.parametrize("ranks", [1, 3])
def test_greedy_is_the_first_of_the_largest(ranks: int) -> None:
    logits, uniforms = some(700)
    logits[:, 650] = logits[:, 40] = logits.amax(-1) + 1
    found, logprobs = drawn([part.contiguous() for part in logits.tensor_split(ranks, -1)], uniforms, greedy=True)
    assert (found == 40).all()
    assert (logprobs - logits.double().log_softmax(-1)[:, 40]).abs().max() <= 2e-6


def test_impossible_tokens_are_never_drawn() -> None:
    """Also where they stand at the end, or are all that a rank or a block has."""
    logits, _ = some(1500)
    logits[:, 1:1024] = logits[:, 1100:] = -torch.inf
    for edge in (2.0**-24, 0.5, 1 - 2.0**-24):
        for ranks in (1, 2, 3):
            parts = [part.contiguous() for part in logits.tensor_split(ranks, -1)]
            found, logprobs = drawn(parts, torch.full((len(logits),), edge))
            assert logprobs.isfinite().all()
            assert logits.gather(-1, found[:, None]).isfinite().all()


def test_nan_stays_in_its_row_and_names_a_token() -> None:
    logits, uniforms = some(600, 4)
    logits[1, 5], logits[2] = torch.nan, torch.nan
    found, logprobs = drawn([logits], uniforms)
    assert logprobs.isnan().tolist() == [False, True, True, False]
    assert ((found >= 0) & (found < 600)).all()


def test_bits_know_no_threads_and_no_neighbours() -> None:
    logits, uniforms = some(3000, 33)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(draw_token(logits, uniforms, False, 0, 0, lambda stats: stats[None]))
            alone = draw_token(logits[7:8], uniforms[7:8], False, 0, 0, lambda stats: stats[None])
            assert torch.equal(alone[:, 0], found[-1][:, 7])
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)
