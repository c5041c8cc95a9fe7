"""Sampling is a function of its indices and follows the softmax, also over a vocabulary that is split over ranks."""

import pytest
import torch
from torch import Tensor

from gearshift.engine import World
from gearshift.engine.heads import LogitTransform
from gearshift.engine.sampling import HeadShard, logits_of, sample_tokens, uniforms
from gearshift.engine.tensor_parallel import TensorParallelGroup
from tests.worker_group import WorkerGroup

ALONE = TensorParallelGroup(World(0, 1, 0, 1, torch.device("cpu")), 1)
VOCABULARY, HIDDEN = 131, 16

# Upper 0.1% points of the chi-square distribution, by degrees of freedom.
CHI_SQUARE_999 = {31: 61.10, 63: 103.44, 255: 330.52}


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts.double() - expected.double()).square() / expected.double()).sum())


def indices(draws: int, samples: int, positions: int) -> list[Tensor]:
    grids = torch.meshgrid(torch.arange(draws), torch.arange(samples), torch.arange(positions), indexing="ij")
    return [grid.flatten() for grid in grids]


def test_uniforms_are_distinct_and_uniform() -> None:
    u = uniforms(3, *indices(500, 4, 50))
    assert u.dtype == torch.float32
    assert u.min() > 0
    assert u.max() < 1
    # 100,000 draws of 2^23 values: about 600 meet by chance (n²/2 / 2^23); an index that is ignored makes them most.
    assert len(u.unique()) > len(u) - 750
    counts = torch.bincount((u.double() * 64).long(), minlength=64)
    assert chi_square(counts, torch.full((64,), len(u) / 64)) < CHI_SQUARE_999[63]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_neighbouring_uniforms_are_independent(index: int) -> None:
    """Pairs that differ by one in one index fill 16 × 16 cells evenly (also for seeds: see the last lines)."""
    at = indices(200, 50, 10)
    ahead = [tensor + (i == index) for i, tensor in enumerate(at)]
    for first, second in [
        (uniforms(3, *at), uniforms(3, *ahead)),
        (uniforms(3, *at), uniforms(4, *at)),
    ]:
        cells = (first.double() * 16).long() * 16 + (second.double() * 16).long()
        counts = torch.bincount(cells, minlength=256)
        assert chi_square(counts, torch.full((256,), len(cells) / 256)) < CHI_SQUARE_999[255]


def test_uniforms_know_no_batch() -> None:
    draws, samples, positions = indices(20, 3, 7)
    whole = uniforms(5, draws, samples, positions)
    order = torch.randperm(len(draws), generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniforms(5, draws[order], samples[order], positions[order]), whole[order])
    assert torch.equal(uniforms(5, draws[17:18], samples[17:18], positions[17:18]), whole[17:18])


def test_the_largest_uniform_is_below_one() -> None:
    """Draw 6,403,530 of seed 0 has all its 24 bits set: rounded to fp32 it must not become 1."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert float(uniforms(0, zero + 6_403_530, zero, zero)) < 1.0


def some_head(seed: int = 0, softcap: float | None = None) -> tuple[Tensor, HeadShard]:
    """Hidden states [400, H] and a head whose distributions are far from uniform, with a bias."""
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(VOCABULARY, HIDDEN, generator=g), torch.randn(VOCABULARY, generator=g)
    return torch.randn(400, HIDDEN, generator=g), HeadShard(weight, bias, 0, LogitTransform(0.5, softcap))


def plain_logits(hidden: Tensor, head: HeadShard) -> Tensor:
    assert head.bias is not None
    logits = (hidden.double() @ head.weight.double().t() + head.bias.double()) * head.transform.scale
    cap = head.transform.softcap
    return logits if cap is None else torch.tanh(logits / cap) * cap


def some_uniforms(rows: int) -> Tensor:
    row = torch.arange(rows)
    return uniforms(11, row, row * 0, row * 0)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_tokens_are_the_inverse_cdf_and_logprobs_the_log_softmax(temperature: float, softcap: float | None) -> None:
    hidden, head = some_head(softcap=softcap)
    uniform = some_uniforms(len(hidden))
    tokens, logprobs = sample_tokens(hidden, head, temperature, uniform, ALONE)
    own = torch.log_softmax(plain_logits(hidden, head) / temperature, -1)
    torch.testing.assert_close(logprobs.double(), own.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=0)
    check_inverse_cdf(tokens, own, uniform)


def check_inverse_cdf(tokens: Tensor, logprobs: Tensor, uniform: Tensor) -> None:
    """The token whose interval of the fp64 CDF holds the uniform; rows within rounding of an edge may go either way."""
    edges = logprobs.exp().cumsum(-1)
    clear = (edges - uniform.double()[:, None]).abs().min(-1).values > 1e-6
    expected = torch.searchsorted(edges, uniform.double()[:, None], right=True)[:, 0]
    assert clear.double().mean() > 0.95
    assert torch.equal(tokens[clear], expected[clear])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_softmax(temperature: float) -> None:
    """50,000 draws of one distribution of 32 tokens, chi-square at 0.1%."""
    hidden = torch.ones(50_000, 1)
    logits = torch.linspace(-2, 1, 32)[torch.randperm(32, generator=torch.Generator().manual_seed(1))]
    head = HeadShard(logits[:, None], None, 0, LogitTransform())
    tokens, _ = sample_tokens(hidden, head, temperature, some_uniforms(len(hidden)), ALONE)
    expected = torch.softmax(logits.double() / temperature, -1) * len(hidden)
    assert chi_square(torch.bincount(tokens, minlength=32), expected) < CHI_SQUARE_999[31]


def test_temperature_zero_is_greedy_with_the_logprobs_of_temperature_one() -> None:
    hidden, head = some_head()
    tokens, logprobs = sample_tokens(hidden, head, 0.0, some_uniforms(len(hidden)), ALONE)
    own = torch.log_softmax(plain_logits(hidden, head), -1)
    assert torch.equal(tokens, own.argmax(-1))
    torch.testing.assert_close(logprobs.double(), own.max(-1).values, atol=1e-5, rtol=0)


def impossible(head: HeadShard, tokens: list[int]) -> HeadShard:
    assert head.bias is not None
    bias = head.bias.clone()
    bias[tokens] = -torch.inf
    return HeadShard(head.weight, bias, head.vocab_start, head.transform)


def test_impossible_tokens_are_never_drawn() -> None:
    """Also at the ends of the vocabulary, and for uniforms at the ends of (0, 1)."""
    hidden, head = some_head()
    banned = [0, 1, 2, 40, 41, 90, 129, 130]
    head = impossible(head, banned)
    for uniform in (some_uniforms(len(hidden)), torch.full((len(hidden),), 2.0**-25), torch.full((400,), 1 - 2.0**-24)):
        for temperature in (1.0, 0.7, 0.0):
            tokens, logprobs = sample_tokens(hidden, head, temperature, uniform, ALONE)
            assert not torch.isin(tokens, torch.tensor(banned)).any()
            assert logprobs.isfinite().all()


def test_bf16_heads_give_fp32_logits() -> None:
    """The operands are bf16, the product is not rounded to it (that alone would move logits of 30 by 0.1)."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 64, generator=g).bfloat16(), torch.randn(8_200, 64, generator=g).bfloat16()
    bias = torch.randn(8_200, generator=g).bfloat16()
    logits = logits_of(hidden, HeadShard(weight, bias, 0, LogitTransform()))
    assert logits.dtype == torch.float32
    own = hidden.double() @ weight.double().t() + bias.double()
    torch.testing.assert_close(logits.double(), own, atol=1e-4, rtol=0)


def split_samples(world: World, banned: list[int], temperature: float, end: float | None) -> tuple[Tensor, Tensor]:
    group = TensorParallelGroup(world, 2)
    hidden, head = some_head()
    head = impossible(head, banned)
    low, high = world.rank * VOCABULARY // 2, (world.rank + 1) * VOCABULARY // 2
    assert head.bias is not None
    part = HeadShard(head.weight[low:high], head.bias[low:high], low, head.transform)
    uniform = some_uniforms(len(hidden)) if end is None else torch.full((len(hidden),), end)
    return sample_tokens(hidden, part, temperature, uniform, group)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_a_split_vocabulary_gives_the_same_tokens(two_ranks: WorkerGroup, temperature: float) -> None:
    """131 tokens over two ranks, 65 and 66: the same tokens and log-probs as one rank, the same bits on both."""
    hidden, head = some_head()
    uniform = some_uniforms(len(hidden))
    (tokens, logprobs), (other_tokens, other_logprobs) = two_ranks.run(split_samples, [], temperature, None)
    assert torch.equal(tokens, other_tokens)
    assert torch.equal(logprobs, other_logprobs)
    own = torch.log_softmax(plain_logits(hidden, head) / (temperature or 1.0), -1)
    torch.testing.assert_close(logprobs.double(), own.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=0)
    if temperature:
        check_inverse_cdf(tokens, own, uniform)
        assert 0.2 < (tokens < 65).double().mean() < 0.8, "both ranks must own tokens for this to mean anything"
    else:
        assert torch.equal(tokens, own.argmax(-1))


@pytest.mark.parametrize("end", [None, 2.0**-25, 1 - 2.0**-24])
def test_impossible_tokens_at_the_cut_are_never_drawn(two_ranks: WorkerGroup, end: float | None) -> None:
    banned = [0, 63, 64, 65, 66, 130]
    for tokens, logprobs in two_ranks.run(split_samples, banned, 1.0, end):
        assert not torch.isin(tokens, torch.tensor(banned)).any()
        assert logprobs.isfinite().all()


@pytest.mark.parametrize("part", [range(65), range(65, 131)])
@pytest.mark.parametrize("end", [None, 1 - 2.0**-24])
def test_a_rank_may_have_no_possible_token(two_ranks: WorkerGroup, part: range, end: float | None) -> None:
    """Where a whole part of the vocabulary is impossible (padding rows, say), the other rank draws."""
    for tokens, logprobs in two_ranks.run(split_samples, list(part), 1.0, end):
        assert not torch.isin(tokens, torch.tensor(list(part))).any()
        assert logprobs.isfinite().all()


def sample_on_the_edge(world: World) -> tuple[Tensor, Tensor]:
    """Each rank has two tokens, of which one is possible; the uniform is exactly where the first rank's mass ends."""
    bias = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])[world.rank]
    part = HeadShard(torch.zeros(2, 1), bias, 2 * world.rank, LogitTransform())
    return sample_tokens(torch.zeros(2, 1), part, 1.0, torch.tensor([0.5, 0.25]), TensorParallelGroup(world, 2))


def test_a_uniform_on_the_edge_of_a_rank_draws_its_first_possible_token(two_ranks: WorkerGroup) -> None:
    for tokens, logprobs in two_ranks.run(sample_on_the_edge):
        assert tokens.tolist() == [3, 0]
        torch.testing.assert_close(logprobs, torch.tensor(0.5).log().expand(2))
