"""`linear_kl` against its fp64 definition: on processors, by the Triton kernels, and split over three processes."""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gearshift.kernels import linear_kl, linear_logprob
from gearshift.kernels import linear_kl_cpu as cpu
from gearshift.kernels import linear_kl_triton as triton
from gearshift.kernels import linear_logprob_cpu as blocks
from gearshift.kernels import linear_logprob_triton as chunks
from gearshift.kernels.linear_kl import plain
from tests.kernels.devices import device
from tests.kernels.heads import T, V, assert_close, in_fp64, largest_logit, make, make_targets, on, run
from tests.kernels.ranks import refusal, run_ranks

MODULE = importlib.import_module("gearshift.kernels.linear_kl")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"softcap": 5.0, "ref_scale": 0.5},
    {"scale": 0.3, "ref_softcap": 4.0, "temperature": 1.3},
]
# One rounding of dz (the interpreter cuts: 2^-8) and one of the gradients (2^-9); see the tests of `linear_logprob`.
BF16_BOUND = 2.0**-8 + 2.0**-9


@pytest.fixture(params=[cpu, triton], ids=["cpu", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations; the device that they are to be tested on."""
    module: ModuleType = request.param
    monkeypatch.setattr(MODULE, "implementation", lambda hidden: module)
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", T * 4096)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 5 * cpu.WIDTH)  # five tokens at a time
    return device() if module is triton else "cpu"


def pair(dtype: torch.dtype = torch.float32, size: float = 1.0, bias: bool = True) -> dict[str, Tensor]:
    """Two heads over the same vocabulary, the reference's hidden states wider."""
    ours, theirs = make(dtype, size, bias), make(dtype, size, bias, seed=5, prefix="ref_", shape=(T, 24, V))
    theirs["ref_weight"] *= 0.5
    return ours | theirs


def largest(inputs: dict[str, Tensor], options: dict[str, Any]) -> float:
    return max(largest_logit(inputs, options), largest_logit(inputs, options, "ref_"))


def compare(inputs: dict[str, Tensor], targets: Tensor, where: str, **options: Any) -> tuple[Any, Any]:
    got = run(linear_kl, on(where, inputs), targets.to(where), **options)
    return got, run(plain, in_fp64(inputs), targets, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_fp32_matches_the_fp64_definition(path: str, options: dict[str, Any], bias: bool) -> None:
    inputs = pair(bias=bias)
    got, want = compare(inputs, make_targets(), path, **options, entropy=True)
    assert set(got) >= {"kl", "logprobs", "ref_logprobs", "entropy"}
    assert (want["kl"] >= 0).all()
    assert_close(got, want, largest(inputs, options))


def test_bf16_loses_its_roundings_only(path: str) -> None:
    inputs = pair(torch.bfloat16, size=0.5)
    got, want = compare(inputs, make_targets(), path, softcap=8.0, entropy=True)
    assert_close(got, want, largest(inputs, {}), gradients=BF16_BOUND)


def test_without_targets_every_token_counts(path: str) -> None:
    inputs = pair()
    result = linear_kl(**on(path, inputs))
    assert result.logprobs is None
    assert result.ref_logprobs is None
    assert result.entropy is None
    assert (result.kl.cpu() - plain(**in_fp64(inputs)).kl).abs().max() <= 2e-6 * largest(inputs, {})


def test_log_probs_and_entropy_are_those_of_linear_logprob() -> None:
    inputs, targets = pair(), make_targets()
    both = linear_kl(**inputs, targets=targets, entropy=True)
    ours = linear_logprob(inputs["hidden"], inputs["weight"], targets, bias=inputs["bias"], entropy=True)
    torch.testing.assert_close(both.logprobs, ours.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(both.entropy, ours.entropy, rtol=0, atol=1e-5)


def test_a_policy_against_itself(path: str) -> None:
    """KL 0 within rounding, whatever its size; and the gradient is 0 too."""
    inputs = make()
    got = run(linear_kl, on(path, inputs | {f"ref_{n}": t for n, t in inputs.items()}), torch.full((T,), 3).to(path))
    assert got["kl"].abs().max() <= 2e-6 * largest_logit(inputs, {})


def with_minus_infinity(ours: tuple[int, ...], theirs: tuple[int, ...]) -> dict[str, Tensor]:
    inputs = pair()
    inputs["bias"][list(ours)] = -torch.inf
    inputs["ref_bias"][list(theirs)] = -torch.inf
    return inputs


def test_what_neither_or_only_the_reference_draws_adds_nothing(path: str) -> None:
    inputs = with_minus_infinity((5, 8, V - 1), (8,))
    targets = make_targets()
    targets[targets == V - 1] = 3
    got, want = compare(inputs, targets, path, entropy=True)
    assert want["kl"].isfinite().all()
    assert_close(got, want, largest(inputs, {}))


def test_what_the_reference_never_draws_makes_the_kl_infinite_and_gives_no_gradient(path: str) -> None:
    inputs = with_minus_infinity((), (7, 5000))
    targets = make_targets()
    result = linear_kl(**{n: t.requires_grad_() for n, t in on(path, inputs).items()}, targets=targets.to(path))
    assert result.kl.isinf().cpu().tolist() == (targets != -100).tolist()
    result.kl.sum().backward()
    # In the last of three chunks only: the others' share of the distribution must not hide it.
    inputs = with_minus_infinity((), (V - 1,))
    got = run(linear_kl, on(path, inputs), targets.to(path))
    assert got["kl"].isinf().tolist() == (targets != -100).tolist()
    assert all(got[name].isfinite().all() for name in ("dhidden", "dweight", "dbias"))


def test_rows_without_a_distribution(path: str) -> None:
    every = tuple(range(V))
    got = run(linear_kl, on(path, with_minus_infinity(every, ())), torch.full((T,), 3).to(path), entropy=True)
    assert got["kl"].tolist() == [0.0] * T
    assert got["entropy"].tolist() == [0.0] * T
    assert got["logprobs"].tolist() == [-torch.inf] * T
    assert not any(got[name].any() for name in ("dhidden", "dweight", "dbias"))
    got = run(linear_kl, on(path, with_minus_infinity((), every)), torch.full((T,), 3).to(path))
    assert got["kl"].tolist() == [torch.inf] * T
    assert got["ref_logprobs"].tolist() == [-torch.inf] * T


@pytest.mark.parametrize("shift", [-200.0, 1e4, -1e4])
def test_huge_logits(path: str, shift: float) -> None:
    inputs = pair(size=0.1)
    inputs["bias"] += shift
    inputs["ref_bias"] -= shift
    got, want = compare(inputs, make_targets(), path, entropy=True)
    assert_close(got, want, abs(shift), gradients=1e-5 + 2e-7 * abs(shift))


def test_ignored_tokens_are_never_read_and_two_runs_have_the_same_bits(path: str) -> None:
    inputs, targets = pair(torch.bfloat16), make_targets()
    for name in ("hidden", "ref_hidden"):
        inputs[name][targets == -100] = torch.nan
    first, second = (run(linear_kl, on(path, inputs), targets.to(path), entropy=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.isfinite().all() for value in first.values())
    for name in ("kl", "logprobs", "ref_logprobs", "entropy", "dhidden"):
        assert not first[name][targets == -100].any()


@pytest.mark.parametrize("tokens", ["none", "all ignored"])
def test_nothing_to_compare(path: str, tokens: str) -> None:
    count = 0 if tokens == "none" else 3
    inputs = {"hidden": torch.full((count, 4), torch.nan), "weight": torch.ones(9, 4)}
    inputs |= {f"ref_{name}": tensor for name, tensor in inputs.items()}
    got = run(linear_kl, on(path, inputs), torch.full((count,), -100).to(path), entropy=True)
    assert all(not got[name].any() for name in got)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_of_the_definition_and_of_the_chunks(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = SimpleNamespace(state=partial(cpu.state, width=4), gradients=partial(cpu.gradients, width=4))
    monkeypatch.setattr(MODULE, "implementation", lambda hidden: narrow)
    rng = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    ours = [noise(5, 4).requires_grad_(), noise(11, 4).requires_grad_(), noise(11).requires_grad_()]
    fixed = {"ref_hidden": noise(5, 3), "ref_weight": noise(11, 3), "targets": torch.tensor([0, 10, -100, 4, 5])}
    options = {"softcap": softcap, "scale": 0.8, "temperature": 0.7, "entropy": True}

    def differentiable(function: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        result = function(hidden, weight, bias=bias, **fixed, **options)
        return result.kl, result.logprobs, result.entropy

    for function in (plain, linear_kl):
        assert torch.autograd.gradcheck(partial(differentiable, function), ours)
    torch.testing.assert_close(differentiable(linear_kl, *ours), differentiable(plain, *ours), rtol=0, atol=1e-13)


def test_compiles_and_passes_fake_tensors() -> None:
    inputs, targets = pair(), make_targets()
    want = run(linear_kl, inputs, targets, entropy=True)
    compiled = torch.compile(partial(linear_kl, entropy=True), fullgraph=True, backend="aot_eager")
    got = run(compiled, inputs, targets)
    assert all(torch.equal(got[name], want[name]) for name in want)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
        assert linear_kl(**fake, targets=mode.from_tensor(targets)).kl.shape == (T,)
    small = {"hidden": torch.randn(2, 3), "weight": torch.randn(7, 3), "bias": torch.randn(7)}
    arguments = (*(t.requires_grad_() for t in small.values()), *(t.detach() for t in small.values()),
                 torch.tensor([0, 6]), 1.0, None, 1.0, None, 1.0, True, None, 0)  # fmt: skip
    torch.library.opcheck(torch.ops.gearshift.linear_kl, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_hidden": torch.zeros(2, 2)}, "ref_hidden must have 3 rows, like hidden, got 2"),
        ({"ref_weight": torch.zeros(8, 2)}, "ref_weight must have 9 rows, like weight, got 8"),
        ({"ref_weight": torch.zeros(9, 5)}, r"ref_weight must be \[vocabulary rows, 2\] to follow ref_hidden \[3, 2\]"),
        ({"ref_bias": torch.zeros(8)}, r"ref_bias must be \[9\]"),
        ({"targets": torch.tensor([0, 9, 0])}, "at most 8, got 9"),
        ({"ref_softcap": -1.0}, "softcap must be above 0"),
        ({"weight": torch.zeros(9, 2, dtype=torch.bfloat16)}, "weight must be torch.float32, like hidden, got"),
        ({"ref_weight": torch.zeros(9, 2, device="meta")}, "ref_weight must be on cpu, like ref_hidden, got meta"),
    ],
)
def test_readable_errors(change: dict[str, Any], message: str) -> None:
    good = {"hidden": torch.zeros(3, 2), "weight": torch.zeros(9, 2)}
    good |= {f"ref_{name}": tensor for name, tensor in good.items()}
    with pytest.raises(ValueError, match=message):
        linear_kl(**(good | change))


SPLITS = {1: (V,), 2: (6000, V - 6000), 3: (4000, 0, V - 4000)}


def _on_a_rank(rank: int) -> dict[str, Any]:
    groups = {size: dist.new_group(list(range(size))) for size in SPLITS}
    found: dict[str, Any] = {}
    for size, split in SPLITS.items():
        if rank >= size:
            continue
        start = sum(split[:rank])
        inputs = pair()
        for name in ("weight", "bias", "ref_weight", "ref_bias"):
            inputs[name] = inputs[name][start : start + split[rank]]
        found[str(size)] = run(
            linear_kl, inputs, make_targets(), group=groups[size], vocab_start=start, entropy=True, softcap=6.0
        )
    ones = {name: torch.ones(4, 3) for name in ("hidden", "weight", "ref_hidden", "ref_weight")}
    found["gap"] = refusal(lambda: linear_kl(**ones, group=groups[3], vocab_start=5 * rank))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(3, _on_a_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("size", list(SPLITS))
def test_split_over_ranks_it_is_the_whole(ranks: list[dict[str, Any]], size: int) -> None:
    inputs, options = pair(), {"entropy": True, "softcap": 6.0}
    want = run(plain, in_fp64(inputs), make_targets(), **options)
    first, *others = (rank[str(size)] for rank in ranks[:size])
    for name in ("kl", "logprobs", "ref_logprobs", "entropy", "dhidden"):  # the same on every rank, bit for bit
        assert all(torch.equal(first[name], other[name]) for other in others), name
    whole = first | {name: torch.cat([part[name] for part in (first, *others)]) for name in ("dweight", "dbias")}
    assert_close(whole, want, largest(inputs, options))
    assert all("leave a gap: rank 1 starts at 5, rank 0 ends at 4" in rank["gap"] for rank in ranks)
