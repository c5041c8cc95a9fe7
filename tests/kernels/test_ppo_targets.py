"""`ppo_targets` against a naive fp64 loop from the end of each sequence, at its edges, and over two processes.

On all its paths: the compiled library's, torch's where none was built, and the GPU's.
"""

from __future__ import annotations

import importlib
import shutil
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from gearshift.kernels import Targets, native, ppo_targets, ppo_targets_triton
from gearshift.kernels.ppo_targets import plain
from gearshift.kernels.ppo_targets_cpu import suffix_sums
from gearshift.kernels.triton_launch import Launch
from tests.kernels.devices import PATHS, device, take
from tests.kernels.ranks import run_ranks

# The package's attribute of this name is the function.
MODULE = importlib.import_module("gearshift.kernels.ppo_targets")
B, L = 7, 37


@pytest.fixture(params=("compiled", *PATHS))
def on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device, with the operation taking one of its paths."""
    if request.param == "compiled":
        assert native.built() is not None or shutil.which("cc") is None, "install again: the library was not built"
        return "cpu"
    if request.param == "torch":
        monkeypatch.setattr(native, "built", lambda: None)
    return take(request.param, MODULE, ppo_targets_triton.ppo_targets, monkeypatch)


def make(on: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    logprobs, values = torch.randn(B, L, generator=rng) - 2, torch.randn(B, L, generator=rng)
    inputs = {
        "logprobs": logprobs,
        "ref_logprobs": logprobs + 0.5 * torch.randn(B, L, generator=rng),
        "values": values,
        "scores": 3 * torch.randn(B, generator=rng),
    }
    inputs = {name: tensor.to(on, dtype) for name, tensor in inputs.items()}
    return inputs | {"mask": (torch.arange(L) < torch.tensor([L, 5, 0, 1, 32, 33, 2])[:, None]).to(on)}


def in_fp64(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor if name == "mask" else tensor.double() for name, tensor in inputs.items()}


def assert_near(got: Targets, want: Targets, bound: float = 1e-6) -> None:
    for name, mine, theirs in zip(Targets._fields, got, want, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).abs().max() <= bound * max(1.0, float(theirs.abs().max())), name


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.9, 0.5), (0.0, 0.9)])
def test_fp32_matches_the_naive_loop(on: str, gamma: float, lam: float, estimator: str, whiten: bool) -> None:
    inputs = make(on)
    options: dict[str, Any] = {"kl_coef": 0.1, "estimator": estimator, "gamma": gamma, "lam": lam, "whiten": whiten}
    assert_near(ppo_targets(**inputs, **options), plain(**in_fp64(inputs), **options))


def test_bf16_inputs_are_computed_in_fp32(on: str) -> None:
    inputs = make(on, torch.bfloat16)
    assert_near(ppo_targets(**inputs, kl_coef=0.1), plain(**in_fp64(inputs), kl_coef=0.1))


def test_one_sequence_by_hand(on: str) -> None:
    """Two tokens and one of padding, γ = ½, λ = ½, KL ½ and −1 at coefficient 2, score 10."""
    tensor = partial(torch.tensor, device=on)
    logprobs = tensor([[-1.0, -2.0, 7.0]])
    ref_logprobs = tensor([[-1.5, -1.0, 7.0]])
    got = ppo_targets(
        logprobs, ref_logprobs, tensor([[1.0, 3.0, 7.0]]), tensor([[True, True, False]]), tensor([10.0]),
        kl_coef=2.0, gamma=0.5, lam=0.5, whiten=False,
    )  # fmt: skip
    assert got.kl.tolist() == [[0.5, -1.0, 0.0]]
    assert got.rewards.tolist() == [[-1.0, 12.0, 0.0]]
    # δ = (−1 + ½·3 − 1, 12 − 3); A = (−½ + ¼·9, 9)
    assert got.advantages.tolist() == [[1.75, 9.0, 0.0]]
    assert got.returns.tolist() == [[2.75, 12.0, 0.0]]


@pytest.mark.parametrize("threads", [1, 2, 5, 20])
def test_threads_change_no_bit(threads: int) -> None:
    inputs, before = make(), torch.get_num_threads()
    want = ppo_targets(**inputs, kl_coef=0.1)
    torch.set_num_threads(threads)
    try:
        got = ppo_targets(**inputs, kl_coef=0.1)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))


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


def test_a_given_kl_takes_the_place_of_the_estimate(on: str) -> None:
    inputs = make(on)
    mask = inputs["mask"]
    want = ppo_targets(**inputs, kl_coef=0.3, estimator="k2")
    inputs["ref_logprobs"] = torch.zeros_like(want.kl)  # no longer read
    got = ppo_targets(**inputs, kl_coef=0.3, kl=want.kl.masked_fill(~mask, torch.nan))
    for name, mine, theirs in zip(Targets._fields, got, want, strict=True):
        assert torch.equal(mine, theirs), name


def test_what_masked_tokens_hold_changes_nothing(on: str) -> None:
    inputs = make(on)
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
def test_without_any_token_all_is_zero(on: str, shape: tuple[int, int]) -> None:
    junk = torch.full(shape, torch.nan, device=on)
    got = ppo_targets(junk, junk, junk, junk > 0, torch.ones(shape[0], device=on), kl_coef=0.1)
    assert all(tensor.shape == shape and not tensor.any() for tensor in got)


def test_whitened_advantages_and_unwhitened_returns(on: str) -> None:
    inputs = make(on)
    mask = inputs["mask"]
    raw, white = (ppo_targets(**inputs, kl_coef=0.1, whiten=on) for on in (False, True))
    chosen = white.advantages[mask].double()
    assert abs(chosen.mean()) <= 1e-6
    assert abs(chosen.var(correction=0) - 1) <= 1e-6
    assert torch.equal(raw.returns, white.returns)


def test_one_token_in_all_whitens_to_zero(on: str) -> None:
    one = torch.ones(1, 1, device=on)
    got = ppo_targets(one, one, one, one > 0, 5 * one[0], kl_coef=0.1)
    assert got.advantages.item() == 0
    assert got.returns.item() == 5


def test_whitening_keeps_its_digits_far_from_zero(on: str) -> None:
    """Σ x² − n·mean² would lose everything at mean 1e6 and deviation 1."""
    inputs = make(on)
    inputs["scores"] += 1e6
    options: dict[str, Any] = {"kl_coef": 0.0, "lam": 1.0}
    raw = ppo_targets(**inputs, **options, whiten=False).advantages[inputs["mask"]].double()
    got = ppo_targets(**inputs, **options).advantages[inputs["mask"]]
    want = (raw - raw.mean()) / raw.std(correction=0)
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def test_impossible_tokens(on: str) -> None:
    """−inf under both models is a log-ratio of 0; an infinite KL costs nothing at coefficient 0, else everything."""
    zeros, ones = torch.zeros(1, 2, device=on), torch.ones(1, device=on)
    gone, mask = torch.full_like(zeros, -torch.inf), zeros == 0
    got = ppo_targets(gone, gone, zeros, mask, ones, kl_coef=0.1, estimator="k3", whiten=False)
    assert got.kl.tolist() == [[0, 0]]
    assert got.rewards.tolist() == [[0, 1]]
    got = ppo_targets(zeros, gone, zeros, mask, ones, kl_coef=0.0, whiten=False)
    assert got.kl.tolist() == [[torch.inf] * 2]
    assert got.rewards.tolist() == [[0, 1]]
    gone[0, 1] = 0
    got = ppo_targets(zeros, gone, zeros, mask, ones, kl_coef=0.1, whiten=False)
    assert got.advantages.tolist() == [[-torch.inf, 1]]


def test_the_same_bits_twice_and_no_gradient(on: str) -> None:
    inputs = make(on)
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
        ({"kl": torch.zeros(2, 3, device="meta")}, "kl must be on cpu, like mask, got meta"),
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


def test_a_hole_in_the_mask_on_a_gpu_is_seen_in_the_advantages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an error would cost a wait: NaN up to the hole, and everywhere once whitened."""
    on = take("triton", MODULE, ppo_targets_triton.ppo_targets, monkeypatch)
    inputs = make(on)
    inputs["mask"][0, :2] = False  # left padding
    inputs["mask"][4, 20] = False
    raw, white = (ppo_targets(**inputs, kl_coef=0.1, whiten=whiten).advantages for whiten in (False, True))
    assert raw.isnan().sum(1).tolist() == [1, 0, 0, 0, 21, 0, 0]
    assert white[inputs["mask"]].isnan().all()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.0, 0.9)])
def test_a_sequence_may_be_longer_than_a_block(gamma: float, lam: float, monkeypatch: pytest.MonkeyPatch) -> None:
    on = take("triton", MODULE, ppo_targets_triton.ppo_targets, monkeypatch)
    short = Launch(ppo_targets_triton.targets_kernel, {"BLOCK": 16}, num_warps=1)
    monkeypatch.setattr(ppo_targets_triton, "ROWS", [short])
    merge = Launch(ppo_targets_triton.merge_kernel, {"GROUPS": 4}, num_warps=1)  # fewer than the sequences
    monkeypatch.setattr(ppo_targets_triton, "MERGE", merge)
    inputs = make(on)
    options: dict[str, Any] = {"kl_coef": 0.1, "gamma": gamma, "lam": lam}
    assert_near(ppo_targets(**inputs, **options), plain(**in_fp64(inputs), **options))


def test_a_long_sequence_keeps_its_digits(on: str) -> None:
    """1,100 tokens without discount: an fp32 sum one after the other would be wrong in its sixth digit."""
    rng = torch.Generator().manual_seed(0)
    logprobs, values = (torch.randn(1, 1100, generator=rng).to(on) for _ in range(2))
    inputs = {"logprobs": logprobs, "ref_logprobs": 0 * logprobs, "values": values, "scores": 0 * values[:, 0]}
    inputs["mask"] = torch.ones_like(values, dtype=torch.bool)
    options: dict[str, Any] = {"kl_coef": 0.1, "lam": 1.0}
    assert_near(ppo_targets(**inputs, **options), plain(**in_fp64(inputs), **options))


def positional(inputs: dict[str, Any], **changes: Any) -> tuple[Any, ...]:
    """What the operator takes."""
    settings = {"kl": None, "kl_coef": 0.1, "estimator": "k1", "gamma": 1.0, "lam": 0.9, "whiten": True, "group": None}
    names = ("logprobs", "ref_logprobs", "values", "mask", "scores", *settings)
    return tuple((settings | inputs | changes)[name] for name in names)


@pytest.mark.parametrize("given", [False, True])
def test_the_operator_is_registered_as_it_behaves(on: str, given: bool) -> None:
    """Also for transposed inputs, whose strides the results must not take over."""
    inputs = {name: tensor[:3].t().contiguous().t() for name, tensor in make(on, torch.bfloat16).items()}
    args = positional(inputs, kl=inputs["values"].float() if given else None)
    torch.library.opcheck(torch.ops.gearshift.ppo_targets.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_passes_through(on: str, dynamic: bool) -> None:
    inputs = make(on)
    compiled = torch.compile(ppo_targets, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for mine, theirs in zip(compiled(**inputs, kl_coef=0.1), ppo_targets(**inputs, kl_coef=0.1), strict=True):
        assert torch.equal(mine, theirs)


def test_fake_tensors_pass_through(on: str) -> None:
    with FakeTensorMode() as mode:
        inputs = {name: mode.from_tensor(tensor) for name, tensor in make(on, torch.bfloat16).items()}
        got = ppo_targets(**inputs, kl_coef=0.1)
    for tensor in got:
        assert isinstance(tensor, FakeTensor)
        assert (tensor.shape, tensor.dtype, tensor.device.type) == ((B, L), torch.float32, on)


SPLITS = [2, 0, B]  # rows of the first rank; a rank may have none
# The ranks are of gloo, which gathers no tensors of a GPU.
RANK_PATHS = PATHS if device() == "cpu" else ("torch",)


def _on_a_rank(rank: int) -> dict[str, Any]:
    paths = {"torch": MODULE.implementation, "triton": lambda mask: ppo_targets_triton.ppo_targets}
    found: dict[str, Any] = {}
    for path in RANK_PATHS:
        MODULE.implementation = paths[path]  # type: ignore[attr-defined]
        for split in SPLITS:
            rows = slice(0, split) if rank == 0 else slice(split, B)
            mine = {name: tensor[rows] for name, tensor in make().items()}
            found[f"{path} {split}"] = tuple(ppo_targets(**mine, kl_coef=0.1, group=dist.group.WORLD))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, _on_a_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("path", RANK_PATHS)
@pytest.mark.parametrize("split", SPLITS)
def test_whitening_is_over_all_ranks(ranks: list[dict[str, Any]], path: str, split: int) -> None:
    left, right = (rank[f"{path} {split}"] for rank in ranks)
    got = Targets(*(torch.cat(pair) for pair in zip(left, right, strict=True)))
    assert_near(got, plain(**in_fp64(make()), kl_coef=0.1))
