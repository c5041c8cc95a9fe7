"""Top-k and top-p keep what `transformers` keeps, however the vocabulary is split, and samples follow what is left."""

import pytest
import torch
from torch import Tensor

from gearshift.engine import World
from gearshift.engine.heads import LogitTransform
from gearshift.engine.sampling import HeadShard, sample_tokens
from gearshift.engine.tensor_parallel import TensorParallelGroup
from gearshift.engine.truncation import kept_tokens
from tests.engine.simulated import on_ranks, shard
from tests.engine.test_sampling import ALONE, chi_square, impossible, plain_logits, some_head, some_uniforms
from tests.worker_group import WorkerGroup

BOTH = [(None, 1.0), (1, 1.0), (7, 1.0), (130, 1.0), (None, 0.9), (None, 0.2), (None, 1e-6), (20, 0.8), (131, 0.999)]


def some_logits(scale: float, rows: int = 300) -> Tensor:
    return torch.randn(rows, 131, generator=torch.Generator().manual_seed(5)) * scale


def of_transformers(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    if top_k is not None:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    return logits > -torch.inf


def kept_on(size: int, logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """What `size` ranks keep, put together."""
    width = logits.shape[1]

    def rank(group: TensorParallelGroup) -> Tensor:
        part = logits[:, group.rank * width // size : (group.rank + 1) * width // size].contiguous()
        return kept_tokens(part, logits.amax(-1), top_k, top_p, group)

    return torch.cat(on_ranks(size, rank), -1)


@pytest.mark.parametrize(("top_k", "top_p"), BOTH)
@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_what_transformers_keeps(scale: float, top_k: int | None, top_p: float) -> None:
    """Distributions from nearly flat to nearly certain; 1, 2 and 5 ranks, of 26 and 27 tokens."""
    logits = some_logits(scale)
    expected = of_transformers(logits, top_k, top_p)
    for size in (1, 2, 5):
        assert torch.equal(kept_on(size, logits, top_k, top_p), expected)


def test_ties_are_kept_together_wherever_they_lie() -> None:
    """Tokens 3, 64, 65 and 130 tie for the second place: no rank and no order decides between them."""
    logits = torch.full((1, 131), -4.0)
    logits[:, 70], logits[:, [3, 64, 65, 130]] = 2.0, 1.0
    tied = torch.zeros(131, dtype=torch.bool)
    tied[[3, 64, 65, 70, 130]] = True
    second = (torch.softmax(logits, -1)[0, 70] + torch.softmax(logits, -1)[0, 3] / 2).item()
    for size in (1, 2, 5):
        for top_k, top_p in [(2, 1.0), (4, 1.0), (5, 1.0), (None, second), (3, 0.9)]:
            assert torch.equal(kept_on(size, logits, top_k, top_p)[0], tied)


def test_signs_and_infinities_are_in_order() -> None:
    """Logits on both sides of 0, 0 and -0 (which tie), and impossible tokens, the whole of a rank's part among them."""
    logits = torch.tensor([[-torch.inf, -torch.inf, -0.0, 0.0, -1e-38, -3.0, 1e-38, -torch.inf]])
    order = [6, 3, 2, 4, 5]
    for count, kept in [(1, 1), (2, 3), (3, 3), (4, 4), (5, 5)]:
        expected = torch.zeros(8, dtype=torch.bool)
        expected[order[:kept]] = True
        for size in (1, 2, 4):
            assert torch.equal(kept_on(size, logits, count, 1.0)[0], expected)
            part = (count - 0.5) / (4 + torch.tensor(-3.0).exp().item()) if count < 5 else 0.9999
            assert torch.equal(kept_on(size, logits, None, part)[0], expected)


def test_a_rank_tells_few_bytes_whatever_the_vocabulary() -> None:
    """4 bytes for each of k values a row, and 4 KiB a row for top-p."""
    for width in (100, 10_000):
        logits = torch.randn(3, width)

        def told(group: TensorParallelGroup, logits: Tensor, top_k: int | None, top_p: float) -> int:
            kept_tokens(logits, logits.amax(-1), top_k, top_p, group)
            return group.bytes_told  # type: ignore[attr-defined]

        for top_k, top_p, bytes_a_row in [(50, 1.0, 200), (None, 0.9, 4096), (50, 0.9, 4296), (None, 1.0, 0)]:
            (found,) = on_ranks(1, lambda group, a=(logits, top_k, top_p): told(group, *a))
            assert found == 3 * bytes_a_row


@pytest.mark.parametrize(("top_k", "top_p"), BOTH)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_are_the_inverse_cdf_of_what_is_kept(top_k: int | None, top_p: float, temperature: float) -> None:
    """And log-probs are of the whole softmax; the same bits on every rank."""
    hidden, head = some_head()
    uniform = some_uniforms(len(hidden))
    logits = plain_logits(hidden, head) / temperature
    kept = of_transformers(logits.float(), top_k, top_p)
    edges = torch.softmax(logits.masked_fill(~kept, -torch.inf), -1).cumsum(-1)
    expected = torch.searchsorted(edges, uniform.double()[:, None], right=True)[:, 0].clamp(max=130)
    clear = (edges - uniform.double()[:, None]).abs().min(-1).values > 1e-6
    assert clear.double().mean() > 0.95
    whole = torch.log_softmax(logits, -1)
    for size in (1, 2, 3):
        ranks = on_ranks(
            size, lambda g: sample_tokens(hidden, shard(head, g.rank, g.size), temperature, uniform, g, top_k, top_p)
        )
        tokens, logprobs = ranks[0]
        assert all(torch.equal(t, tokens) and torch.equal(p, logprobs) for t, p in ranks)
        assert kept.gather(1, tokens[:, None]).all()
        assert torch.equal(tokens[clear], expected[clear])
        torch.testing.assert_close(logprobs.double(), whole.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=0)


def test_greedy_draws_nothing() -> None:
    hidden, head = some_head()
    plain = sample_tokens(hidden, head, 0.0, some_uniforms(len(hidden)), ALONE)
    cut = sample_tokens(hidden, head, 0.0, some_uniforms(len(hidden)), ALONE, 5, 0.3)
    assert torch.equal(plain[0], cut[0])
    assert torch.allclose(plain[1], cut[1], rtol=1e-5, atol=1e-6)


def test_a_part_of_the_vocabulary_may_have_nothing_to_draw() -> None:
    hidden, head = some_head()
    banned = list(range(65))
    for end in (2.0**-25, 0.5, 1 - 2.0**-24):
        uniform = torch.full((len(hidden),), end)
        for tokens, logprobs in on_ranks(
            2, lambda g, u=uniform: sample_tokens(hidden, shard(impossible(head, banned), g.rank, 2), 1.0, u, g, 9, 0.7)
        ):
            assert not torch.isin(tokens, torch.tensor(banned)).any()
            assert logprobs.isfinite().all()


# Of 32 tokens: how many each setting leaves, and the upper 0.1% point of the chi-square distribution with one less
# degree of freedom.
CUTS = [(None, 1.0, 32, 61.10), (8, 1.0, 8, 24.32), (None, 0.8, 14, 34.53), (12, 0.75, 8, 24.32)]
DRAWS = 20_000


def thirty_two() -> HeadShard:
    logits = torch.linspace(-2, 1, 32)[torch.randperm(32, generator=torch.Generator().manual_seed(1))]
    return HeadShard(logits[:, None], None, 0, LogitTransform())


def draw_split(world: World, top_k: int | None, top_p: float) -> Tensor:
    group = TensorParallelGroup(world, world.size)
    part = shard(thirty_two(), world.rank, world.size)
    return sample_tokens(torch.ones(DRAWS, 1), part, 0.9, some_uniforms(DRAWS), group, top_k, top_p)[0]


def check_distribution(tokens: Tensor, top_k: int | None, top_p: float, left: int, most: float) -> None:
    logits = thirty_two().weight[:, 0].double() / 0.9
    kept = of_transformers(logits[None].float(), top_k, top_p)[0]
    assert int(kept.sum()) == left
    counts = torch.bincount(tokens, minlength=32)
    assert not counts[~kept].any()
    assert chi_square(counts[kept], torch.softmax(logits[kept], -1) * DRAWS) < most


@pytest.mark.parametrize(("top_k", "top_p", "left", "most"), CUTS)
def test_samples_follow_the_softmax_of_what_is_kept(
    two_ranks: WorkerGroup, top_k: int | None, top_p: float, left: int, most: float
) -> None:
    """20,000 draws, chi-square at 0.1%: on one rank, on two real ranks, on three simulated ones."""
    head = thirty_two()
    uniform = some_uniforms(DRAWS)
    alone, _ = sample_tokens(torch.ones(DRAWS, 1), head, 0.9, uniform, ALONE, top_k, top_p)
    check_distribution(alone, top_k, top_p, left, most)
    first, second = two_ranks.run(draw_split, top_k, top_p)
    assert torch.equal(first, second)
    check_distribution(first, top_k, top_p, left, most)
    three = on_ranks(
        3, lambda g: sample_tokens(torch.ones(DRAWS, 1), shard(head, g.rank, 3), 0.9, uniform, g, top_k, top_p)[0]
    )
    check_distribution(three[2], top_k, top_p, left, most)
