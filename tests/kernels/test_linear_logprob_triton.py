"""`linear_logprob`'s Triton kernels: interpreted here, on the GPU where there is one (see `devices`)."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch

from gearshift.kernels import linear_logprob
from gearshift.kernels import linear_logprob_triton as on_gpu
from gearshift.kernels.linear_logprob import plain
from gearshift.kernels.states import empty_states, merge
from tests.kernels.devices import device
from tests.kernels.heads import (
    OPTIONS,
    T,
    assert_close,
    in_fp64,
    largest_logit,
    make,
    make_targets,
    on,
    run,
)

MODULE = importlib.import_module("gearshift.kernels.linear_logprob")
# dz is rounded to bf16 once before the products (half an ulp, 2^-9; the interpreter cuts: 2^-8), the gradients once
# after them (2^-9): in norm at most their sum. fp16 has three bits more; what is below its normal range loses more.
HALF_BOUND = {torch.bfloat16: 2.0**-8 + 2.0**-9, torch.float16: 2.0**-10}


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "implementation", lambda hidden: on_gpu)
    monkeypatch.setattr(on_gpu, "CHUNK_ELEMENTS", T * 4096)  # three chunks


def compare(inputs: dict[str, torch.Tensor], targets: torch.Tensor, **options: Any) -> tuple[Any, Any]:
    got = run(linear_logprob, on(device(), inputs), targets.to(device()), **options)
    return got, run(plain, in_fp64(inputs), targets, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_fp32_matches_the_fp64_definition(options: dict[str, Any], bias: bool) -> None:
    inputs = make(bias=bias)
    got, want = compare(inputs, make_targets(), **options, entropy=True)
    assert_close(got, want, largest_logit(inputs, options))


def test_without_the_entropy() -> None:
    inputs = make()
    got, want = compare(inputs, make_targets())
    assert_close(got, want, largest_logit(inputs, {}))


@pytest.mark.parametrize("dtype", list(HALF_BOUND), ids=str)
def test_half_precision_loses_its_roundings_only(dtype: torch.dtype) -> None:
    inputs, options = make(dtype, size=0.5), {"softcap": 8.0, "temperature": 0.9, "entropy": True}
    got, want = compare(inputs, make_targets(), **options)
    assert_close(got, want, largest_logit(inputs, options), gradients=HALF_BOUND[dtype])


def test_a_target_in_the_next_ranks_range_is_not_taken_from_the_padding() -> None:
    rows = 777  # the last tile reaches to column 896
    inputs = on(device(), make(torch.bfloat16, shape=(4, 16, rows), bias=False))
    local = torch.tensor([0, rows - 1, rows, rows + 50], device=device())
    head = MODULE.Head()
    state = on_gpu.state(inputs["hidden"], inputs["weight"], None, local, head, False)
    assert state[:, 3].isnan().tolist() == [False, False, True, True]


def test_logits_of_minus_infinity() -> None:
    """One such column, a whole row of them, and all logits at −200 and ±1e4."""
    for bias, size in [(-200.0, 0.1), (1e4, 0.1), (-1e4, 0.1)]:
        inputs = make(torch.bfloat16, shape=(5, 16, 300), size=size)
        inputs["bias"] = torch.full((300,), bias, dtype=torch.bfloat16)
        inputs["bias"][7] = -torch.inf
        got, want = compare(inputs, torch.tensor([0, 7, 299, -100, 5]), entropy=True)
        assert got["logprobs"][1] == -torch.inf
        assert_close(got, want, abs(bias), gradients=HALF_BOUND[torch.bfloat16])
    inputs["bias"][:] = -torch.inf
    got, _ = compare(inputs, torch.tensor([0, 7, 299, -100, 5]), entropy=True)
    assert got["logprobs"].tolist() == [-torch.inf, -torch.inf, -torch.inf, 0.0, -torch.inf]
    assert got["entropy"].tolist() == [0.0] * 5
    assert not any(got[name].any() for name in ("dhidden", "dweight", "dbias"))


def test_masked_tokens_are_never_read_and_two_runs_have_the_same_bits() -> None:
    inputs, targets = make(torch.bfloat16), make_targets()
    inputs["hidden"][targets == -100] = torch.nan
    first, second = (run(linear_logprob, on(device(), inputs), targets.to(device()), entropy=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.isfinite().all() for value in first.values())
    assert not first["dhidden"][targets == -100].any()


def test_eight_parts_merge_into_the_whole() -> None:
    """As eight ranks would each find theirs; one part is empty."""
    inputs, targets = make(torch.bfloat16, shape=(9, 16, 2000)), torch.arange(9) * 211
    x, weight, bias = on(device(), inputs).values()
    edges = [0, 250, 500, 500, 900, 1100, 1500, 1999, 2000]
    parts = [
        on_gpu.state(x, weight[a:b], bias[a:b].contiguous(), targets.to(device()) - a, MODULE.Head(), True)
        for a, b in itertools.pairwise(edges)
    ]
    top, total, numerator, chosen = merge(torch.stack(parts)).cpu().unbind(1)
    want = plain(**in_fp64(inputs), targets=targets, entropy=True)
    bound = 2e-6 * largest_logit(inputs, {})
    assert (chosen - top - total.log() - want.logprobs).abs().max() <= bound
    assert want.entropy is not None
    assert (total.log() - numerator / total - want.entropy).abs().max() <= bound


def test_offsets_past_two_to_the_31() -> None:
    """A third row 2^31 elements on: 8 GB of addresses, of which only that row is ever written or read back."""
    stride, columns = 2**30, 64
    products = torch.empty(2 * stride + columns, device=device())
    logits = torch.linspace(-3, 3, columns)
    for row in range(3):
        products[row * stride : row * stride + columns] = logits.to(device()) * (row + 1)
    states = empty_states(3, 4, products[:0])
    local = torch.tensor([1, 2, 3], device=device())
    options = {"HAS_BIAS": False, "SOFTCAP": False, "ENTROPY": False}
    on_gpu.STATE((3,), products, products, local, states, columns, 0, stride, 1.0, 1.0, 1.0, **options)
    top, total, _, target = states.cpu().unbind(1)
    want = torch.stack([logits * (row + 1) for row in range(3)]).log_softmax(1)[range(3), [1, 2, 3]]
    torch.testing.assert_close(target - top - total.log(), want, rtol=0, atol=2e-6 * 9)
