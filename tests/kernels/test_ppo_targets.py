"""`ppo_targets` against a naive fp64 loop from the end of each sequence, at its edges, and over two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gearshift.kernels import Targets, ppo_targets
from gearshift.kernels.ppo_targets import plain, suffix_sums

B, L = 7, 37


def make(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    logprobs, values = torch.randn(B, L, generator=rng) - 2, torch.randn(B, L, generator=rng)
    inputs = {
        "logprobs": logprobs,
        "ref_logprobs": logprobs + 0.5 * torch.randn(B, L, generator=rng),
        "values": values,
        "scores": 3 * torch.randn(B, generator=rng),
    }
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    return inputs | {"mask": torch.arange(L) < torch.tensor([L, 5, 0, 1, 32, 33, 2])[:, None]}


def in_fp64(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor if name == "mask" else tensor.double() for name, tensor in inputs.items()}


def assert_near(got: Targets, want: Targets, bound: float = 2e-6) -> None:
    for name, mine, theirs in zip(Targets._fields, got, want, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).abs().max() <= bound * max(1.0, float(theirs.abs().max())), name


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.9, 0.5), (0.0, 0.9)])
def test_fp32_matches_the_naive_loop(gamma: float, lam: float, estimator: str, whiten: bool) -> None:
    inputs = make()
    options: dict[str, Any] = {"kl_coef": 0.1, "estimator": estimator, "gamma": gamma, "lam": lam, "whiten": whiten}
    assert_near(ppo_targets(**inputs, **options), plain(**in_fp64(inputs), **options))


def test_bf16_inputs_are_computed_in_fp32() -> None:
    inputs = make(torch.bfloat16)
    assert_near(ppo_targets(**inputs, kl_coef=0.1), plain(**in_fp64(inputs), kl_coef=0.1))


def test_one_sequence_by_hand() -> None:
    """Two tokens and one of padding, γ = ½, λ = ½, KL ½ and −1 at coefficient 2, score 10."""
    logprobs = torch.tensor([[-1.0, -2.0, 7.0]])
    ref_logprobs = torch.tensor([[-1.5, -1.0, 7.0]])
    got = ppo_targets(
        logprobs, ref_logprobs, torch.tensor([[1.0, 3.0, 7.0]]), torch.tensor([[True, True, False]]),
        torch.tensor([10.0]), kl_coef=2.0, gamma=0.5, lam=0.5, whiten=False,
    )  # fmt: skip
    assert got.kl.tolist() == [[0.5, -1.0, 0.0]]
    assert got.rewards.tolist() == [[-1.0, 12.0, 0.0]]
    # δ = (−1 + ½·3 − 1, 12 − 3); A = (−½ + ¼·9, 9)
    assert got.advantages.tolist() == [[1.75, 9.0, 0.0]]
    assert got.returns.tolist() == [[2.75, 12.0, 0.0]]


@pytest.mark.parametrize("length", [0, 1, 2, 3, 8, 1025])
def test_suffix_sums(length: int) -> None:
    terms = torch.randn(2, length, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want, later = torch.zeros_like(terms), torch.zeros(2, dtype=torch.float64)
    for t in reversed(range(length)):
        later = terms[:, t] + 0.99 * later
        want[:, t] = later
    before = terms.clone()
    torch.testing.assert_close(suffix_sums(terms, 0.99), want, rtol=0, atol=1e-12)
    assert torch.equal(terms, before)


def test_a_given_kl_takes_the_place_of_the_estimate() -> None:
    inputs = make()
    mask = inputs["mask"]
    kl = (inputs["logprobs"] - inputs["ref_logprobs"]).square() * 0.5
    want = ppo_targets(**inputs, kl_coef=0.3, estimator="k2")
    inputs["ref_logprobs"] = torch.zeros_like(kl)  # no longer read
    got = ppo_targets(**inputs, kl_coef=0.3, kl=kl.masked_fill(~mask, torch.nan))
    for name, mine, theirs in zip(Targets._fields, got, want, strict=True):
        assert torch.equal(mine, theirs), name


def test_what_masked_tokens_hold_changes_nothing() -> None:
    inputs = make()
    mask = inputs["mask"]
    clean = ppo_targets(**inputs, kl_coef=0.1, estimator="k3")
    for junk in (torch.nan, torch.inf, -torch.inf):
        dirty = {k: v.masked_fill(~mask, junk) if v.shape == mask.shape and k != "mask" else v
                 for k, v in inputs.items()}  # fmt: skip
        dirty["scores"] = inputs["scores"].masked_fill(~mask.any(1), junk)  # the score of an empty row
        got = ppo_targets(**dirty, kl_coef=0.1, estimator="k3")
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, clean, strict=True))
    assert not any(tensor[~mask].any() for tensor in clean)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 3)])
def test_without_any_token_all_is_zero(shape: tuple[int, int]) -> None:
    junk = torch.full(shape, torch.nan)
    got = ppo_targets(junk, junk, junk, junk > 0, torch.ones(shape[0]), kl_coef=0.1)
    assert all(tensor.shape == shape and not tensor.any() for tensor in got)


def test_whitened_advantages_and_unwhitened_returns() -> None:
    inputs = make()
    mask = inputs["mask"]
    raw, white = (ppo_targets(**inputs, kl_coef=0.1, whiten=on) for on in (False, True))
    chosen = white.advantages[mask].double()
    assert abs(chosen.mean()) <= 1e-6
    assert abs(chosen.var(correction=0) - 1) <= 1e-6
    assert torch.equal(raw.returns, white.returns)


def test_one_token_in_all_whitens_to_zero() -> None:
    one = torch.ones(1, 1)
    got = ppo_targets(one, one, one, one > 0, torch.tensor([5.0]), kl_coef=0.1)
    assert got.advantages.item() == 0
    assert got.returns.item() == 5


def test_whitening_keeps_its_digits_far_from_zero() -> None:
    """Σ x² − n·mean² would lose everything at mean 1e6 and deviation 1."""
    inputs = make()
    inputs["scores"] += 1e6
    options: dict[str, Any] = {"kl_coef": 0.0, "lam": 1.0}
    raw = ppo_targets(**inputs, **options, whiten=False).advantages[inputs["mask"]].double()
    got = ppo_targets(**inputs, **options).advantages[inputs["mask"]]
    want = (raw - raw.mean()) / raw.std(correction=0)
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def test_impossible_tokens() -> None:
    """−inf under both models is a log-ratio of 0; an infinite KL at coefficient 0 costs nothing."""
    gone = torch.full((1, 2), -torch.inf)
    mask = torch.ones(1, 2, dtype=torch.bool)
    got = ppo_targets(gone, gone, torch.zeros(1, 2), mask, torch.ones(1), kl_coef=0.1, estimator="k3", whiten=False)
    assert got.kl.tolist() == [[0, 0]]
    assert got.rewards.tolist() == [[0, 1]]
    got = ppo_targets(torch.zeros(1, 2), gone, torch.zeros(1, 2), mask, torch.ones(1), kl_coef=0.0, whiten=False)
    assert got.kl.tolist() == [[torch.inf] * 2]
    assert got.rewards.tolist() == [[0, 1]]


def test_the_same_bits_twice_and_no_gradient() -> None:
    inputs = make()
    inputs["values"].requires_grad_()
    first, second = (ppo_targets(**inputs, kl_coef=0.1) for _ in range(2))
    for mine, again in zip(first, second, strict=True):
        assert torch.equal(mine, again)
        assert not mine.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.zeros(2, 3)}, "mask must be bool"),
        ({"mask": torch.tensor([[True, False, True]] * 2)}, "mask must be right-padded"),
        ({"values": torch.zeros(2, 4)}, r"values must be \[2, 3\]"),
        ({"kl": torch.zeros(2)}, r"kl must be \[2, 3\]"),
        ({"scores": torch.zeros(3)}, r"scores must be \[2\] \(\[B\], one per row\), got \[3\]"),
        ({"scores": torch.zeros(2, dtype=torch.int64)}, "scores must be floating point"),
        ({"estimator": "k4"}, "estimator must be one of k1, k2, k3, got 'k4'"),
        ({"gamma": 1.1}, "gamma must be within 0 and 1"),
        ({"lam": -0.1}, "lam must be within 0 and 1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_readable_errors(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = dict.fromkeys(["logprobs", "ref_logprobs", "values"], torch.zeros(2, 3))
    good |= {"mask": torch.ones(2, 3, dtype=torch.bool), "scores": torch.zeros(2), "kl_coef": 0.1}
    with pytest.raises(ValueError, match=message):
        ppo_targets(**(good | change))


SPLITS = [2, 0, B]  # rows of the first rank; a rank may have none


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for split in SPLITS:
        rows = slice(0, split) if rank == 0 else slice(split, B)
        mine = {name: tensor[rows] for name, tensor in make().items()}
        results.append(tuple(ppo_targets(**mine, kl_coef=0.1, group=dist.group.WORLD)))
    torch.save(results, f"{folder}/rank{rank}")
    dist.destroy_process_group()


def test_whitening_is_over_all_ranks(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in range(2)]
    want = plain(**in_fp64(make()), kl_coef=0.1)
    for left, right in zip(*ranks, strict=True):
        assert_near(Targets(*(torch.cat(pair) for pair in zip(left, right, strict=True))), want)
