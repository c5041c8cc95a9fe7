"""`linear_logprob` against its fp64 definition, at the edges of its contract, and split over two processes."""

from __future__ import annotations

import importlib
import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gearshift.kernels import linear_logprob
from gearshift.kernels import linear_logprob_cpu as cpu
from gearshift.kernels.head import CHUNK, Head
from gearshift.kernels.linear_logprob import plain
from gearshift.kernels.states import merge
from tests.kernels.heads import (
    OPTIONS,
    H,
    T,
    V,
    assert_close,
    in_fp64,
    largest_logit,
    make,
    make_targets,
    relative,
    run,
)
from tests.kernels.ranks import refusal, run_ranks

# The package's attribute of this name is the function.
MODULE = importlib.import_module("gearshift.kernels.linear_logprob")


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fp32_matches_the_fp64_definition(options: dict[str, Any], bias: bool, entropy: bool) -> None:
    inputs, targets = make(bias=bias), make_targets()
    options = options | {"entropy": entropy}
    got, want = run(linear_logprob, inputs, targets, **options), run(plain, in_fp64(inputs), targets, **options)
    assert ("entropy" in got) == entropy
    assert_close(got, want, largest_logit(inputs, options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_lose_only_the_rounding_of_their_gradients(dtype: torch.dtype) -> None:
    inputs, targets = make(dtype), make_targets()
    options = {"temperature": 0.9, "entropy": True}
    got, want = run(linear_logprob, inputs, targets, **options), run(plain, in_fp64(inputs), targets, **options)
    for name in ("logprobs", "entropy"):
        assert got[name].dtype == torch.float32
        assert (got[name] - want[name]).abs().max() <= 2e-6 * largest_logit(inputs, options), name
    # One rounding of each element: half an ulp, at most 2^-8 of it in bf16 and 2^-11 in fp16, where those below normal
    # numbers (6e-5) lose up to 3e-8 instead; and what sums in fp32 lose, of the largest.
    half_ulp, flat = {torch.bfloat16: (2.0**-8, 0.0), torch.float16: (2.0**-11, 3e-8)}[dtype]
    for name in inputs:
        assert got["d" + name].dtype == dtype
        wanted = want["d" + name].abs()
        error = (got["d" + name].double() - want["d" + name]).abs()
        assert (error <= half_ulp * wanted + flat + 1e-6 * wanted.max()).all(), name


def small(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    rng = torch.Generator().manual_seed(3)
    shapes = [(5, 4), (11, 4), (11,)]
    tensors = [torch.randn(shape, generator=rng, dtype=dtype).requires_grad_() for shape in shapes]
    return tensors, torch.tensor([0, 10, -100, 4, 5])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_of_the_definition_and_of_the_chunks(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, targets = small()
    narrow = SimpleNamespace(state=partial(cpu.state, width=4), gradients=partial(cpu.gradients, width=4))
    monkeypatch.setattr(MODULE, "implementation", lambda hidden: narrow)
    options = {"scale": 0.8, "softcap": softcap, "temperature": 0.7, "entropy": True}

    def by_definition(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return tuple(plain(hidden, weight, targets, bias=bias, **options))

    def by_chunks(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return tuple(linear_logprob(hidden, weight, targets, bias=bias, **options))

    assert torch.autograd.gradcheck(by_definition, tensors)
    assert torch.autograd.gradcheck(by_chunks, tensors)
    torch.testing.assert_close(by_chunks(*tensors), by_definition(*tensors), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("tokens", "vocab"), [(0, 777), (1, 1999), (37, 50257), (129, 777), (129, 1999)])
def test_sizes_that_divide_by_nothing(tokens: int, vocab: int) -> None:
    inputs = make(shape=(tokens, 200, vocab), size=0.2)
    targets = torch.arange(tokens) * 7919 % vocab
    if tokens > 2:
        targets[1] = -100
        inputs["weight"][0] = 1e3 * inputs["hidden"][0]  # the first token's distribution is all but one-hot
    got, want = (run(f, x, targets, entropy=True) for f, x in ((linear_logprob, inputs), (plain, in_fp64(inputs))))
    assert got["logprobs"].shape == (tokens,)
    if tokens:
        assert_close(got, want, largest_logit(inputs, {}))


def test_compiles_and_passes_fake_tensors() -> None:
    inputs, targets = make(), make_targets()
    want = run(linear_logprob, inputs, targets, entropy=True)
    compiled = torch.compile(partial(linear_logprob, entropy=True), fullgraph=True, backend="aot_eager")
    got = run(compiled, inputs, targets)
    assert all(torch.equal(got[name], want[name]) for name in want)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
        result = linear_logprob(**fake, targets=mode.from_tensor(targets))
        assert (result.logprobs.shape, result.logprobs.dtype) == ((T,), torch.float32)


def test_the_operators_keep_the_rules_of_torch_library() -> None:
    inputs, targets = make(shape=(4, 3, 11)), torch.tensor([0, 10, -100, 3])
    arguments = (*(tensor.requires_grad_() for tensor in inputs.values()), targets, 1.0, None, 1.0, True, None, 0)
    torch.library.opcheck(torch.ops.gearshift.linear_logprob, arguments)


def test_entropy_is_that_of_the_distribution() -> None:
    hidden, weight = torch.zeros(2, 3), torch.randn(CHUNK + 5, 3)
    _, entropy = linear_logprob(hidden, weight, torch.tensor([0, CHUNK]), entropy=True)
    assert entropy is not None
    torch.testing.assert_close(entropy, torch.full((2,), CHUNK + 5.0).log(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("ignored", ["no tokens", "all ignored"])
def test_nothing_to_score(ignored: str) -> None:
    count = 0 if ignored == "no tokens" else 3
    hidden = torch.full((count, H), torch.nan, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    logprobs, entropy = linear_logprob(hidden, weight, torch.full((count,), -100), entropy=True)
    assert entropy is not None
    assert logprobs.shape == entropy.shape == (count,)
    assert not logprobs.any()
    assert not entropy.any()
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.shape == hidden.shape
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_what_an_ignored_token_holds_changes_nothing() -> None:
    inputs, targets = make(), make_targets()
    clean = run(linear_logprob, inputs, targets, entropy=True)
    inputs["hidden"][targets == -100] = torch.nan
    got = run(linear_logprob, inputs, targets, entropy=True)
    assert all(torch.equal(got[name], clean[name]) for name in clean)
    assert not got["logprobs"][targets == -100].any()
    assert not got["dhidden"][targets == -100].any()


def test_impossible_columns_add_nothing() -> None:
    """−inf in the bias: scattered columns, a whole chunk (a padded vocabulary), and one target."""
    inputs, targets = make(), make_targets()
    inputs["bias"][5::7] = -torch.inf
    inputs["bias"][CHUNK : 2 * CHUNK] = -torch.inf  # target 1 lies here
    inputs["bias"][targets[[0, 2, 3]]] = 0.5
    got = run(linear_logprob, inputs, targets, entropy=True)
    want = run(plain, in_fp64(inputs), targets, entropy=True)
    assert got["logprobs"][1] == -torch.inf
    bound = 2e-6 * largest_logit(inputs, {})
    for name in ("logprobs", "entropy"):
        torch.testing.assert_close(got[name].double(), want[name], rtol=0, atol=bound)
    for name in ("dhidden", "dweight", "dbias"):
        assert relative(got[name], want[name]) <= 1e-5, name  # a NaN or an infinity fails too


def test_a_row_without_any_possible_token() -> None:
    inputs, targets = make(), make_targets()
    inputs["bias"][:] = -torch.inf
    for function in (linear_logprob, plain):
        got = run(function, inputs, targets, entropy=True)
        assert (got["logprobs"][targets != -100] == -torch.inf).all()
        assert not got["logprobs"][targets == -100].any()
        assert all(not got[name].any() for name in ("entropy", "dhidden", "dweight", "dbias"))


@pytest.mark.parametrize("size", [3e3, -300.0])
def test_huge_logits(size: float) -> None:
    """|z| beyond 1e4, and rows whose logits are all far below e^-104 = 0."""
    inputs, targets = make(size=abs(size)), make_targets()
    if size < 0:
        inputs["bias"] -= 1e4
    assert largest_logit(inputs, {}) > 1e4
    got = run(linear_logprob, inputs, targets, entropy=True)
    want = run(plain, in_fp64(inputs), targets, entropy=True)
    assert (got["logprobs"] - want["logprobs"]).abs().max() <= 2e-6 * largest_logit(inputs, {})
    assert all(value.isfinite().all() for value in got.values())


def test_the_gradient_of_micro_batches_adds_up_to_the_whole() -> None:
    """Of a sum over tokens: cut in three, the weight's gradient differs by the rounding of two additions."""
    inputs, targets = make(), make_targets()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    for rows in torch.arange(T).split(9):
        part = leaves | {"hidden": leaves["hidden"][rows]}
        linear_logprob(**part, targets=targets[rows]).logprobs.sum().backward()
    whole = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    linear_logprob(**whole, targets=targets).logprobs.sum().backward()
    for name in inputs:
        assert relative(leaves[name].grad, whole[name].grad.double()) <= 1e-6, name


def test_the_same_bits_twice() -> None:
    inputs, targets = make(torch.bfloat16), make_targets()
    first, second = (run(linear_logprob, inputs, targets, softcap=4.0, entropy=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


class Allocations(TorchDispatchMode):
    """The numbers of elements of every tensor that an operation returns, and the operations' names."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in tree_leaves(out)
                 if isinstance(leaf, Tensor)]  # fmt: skip
        self.largest = max([self.largest, *sizes])
        self.products += "mm" in func.__name__
        return out


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Allocations:
    """What is allocated within the operators, which a dispatch mode around them does not see into."""
    seen = Allocations()

    def watched(function: Any) -> Any:
        def call(*args: Any) -> Any:
            with seen:
                return function(*args)

        return call

    watched_cpu = SimpleNamespace(state=watched(cpu.state), gradients=watched(cpu.gradients))
    monkeypatch.setattr(MODULE, "implementation", lambda hidden: watched_cpu)
    return seen


def test_never_holds_the_logits(seen: Allocations) -> None:
    tokens, vocab = 64, 5 * CHUNK
    hidden, weight = torch.randn(tokens, 8), torch.randn(vocab, 8)
    targets = torch.arange(tokens)
    run(linear_logprob, {"hidden": hidden, "weight": weight}, targets, softcap=9.0, entropy=True)
    assert seen.largest <= max(tokens * CHUNK, vocab * 8) < tokens * vocab / 4
    with Allocations() as whole:
        run(plain, {"hidden": hidden, "weight": weight}, targets)
    assert whole.largest >= tokens * vocab


@pytest.mark.parametrize(("frozen", "products"), [((), 9), (("weight",), 6), (("hidden",), 6)])
def test_a_frozen_input_costs_no_gradient(frozen: tuple[str, ...], products: int, seen: Allocations) -> None:
    """Three chunks: three products each for the forward, its recomputation is two more with dX and dW."""
    inputs, targets = make(bias=False), make_targets()
    for name, tensor in inputs.items():
        tensor.requires_grad_(name not in frozen)
    logprobs, _ = linear_logprob(inputs["hidden"], inputs["weight"], targets)
    assert seen.products == 3
    logprobs.sum().backward()
    assert seen.products == 3 + products
    assert all((inputs[name].grad is None) == (name in frozen) for name in inputs)


def test_the_weight_may_be_away_between_forward_and_backward() -> None:
    """As under ZeRO-3, which empties `.data` after the forward and gathers it, elsewhere, before backward."""
    inputs, targets = make(torch.bfloat16), make_targets()
    want = run(linear_logprob, inputs, targets)
    weight = torch.nn.Parameter(inputs["weight"].clone())
    hidden = inputs["hidden"].clone().requires_grad_()
    logprobs, _ = linear_logprob(hidden, weight, targets, bias=inputs["bias"])
    weight.data.fill_(torch.nan)  # a kept copy or view would now be wrong
    weight.data = torch.empty(0, dtype=torch.bfloat16)
    weight.data = inputs["weight"].clone()
    rng = torch.Generator().manual_seed(2)
    (logprobs.double() * torch.randn(T, generator=rng, dtype=torch.float64)).sum().backward()
    assert torch.equal(hidden.grad, want["dhidden"])
    assert torch.equal(weight.grad, want["dweight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, 0])}, r"targets must be \[3\]"),
        ({"targets": torch.tensor([0, 9, 0])}, "at most 8, got 9"),
        ({"targets": torch.tensor([0, -1, 0])}, "at least 0 and at most 8, got -1"),
        ({"targets": torch.zeros(3)}, "targets must be int64"),
        ({"weight": torch.zeros(0)}, r"weight must be \[vocabulary rows, 2\]"),
        ({"hidden": torch.zeros(1, 3, 2)}, r"hidden must be \[T, H\], got \[1, 3, 2\]"),
        ({"bias": torch.zeros(8)}, r"bias must be \[9\]"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"weight": torch.zeros(9, 2, dtype=torch.int64)}, "weight must be floating point"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_readable_errors(change: dict[str, Any], message: str) -> None:
    good = {"hidden": torch.zeros(3, 2), "weight": torch.zeros(9, 2), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**(good | change))


# Rows of the vocabulary on each rank, by how many ranks share it: uneven, empty, a single row.
SPLITS = {1: [(V,)], 2: [(6000, V - 6000), (0, V), (V - 1, 1)], 3: [(4000, 3000, V - 7000), (1, 0, V - 1)]}
SPLIT_OPTIONS = {"scale": 1.1, "softcap": 6.0, "temperature": 0.9, "entropy": True}


def _on_a_rank(rank: int) -> dict[str, Any]:
    groups = {size: dist.new_group(list(range(size))) for size in SPLITS}
    found: dict[str, Any] = {}
    for size, splits in SPLITS.items():
        for number, split in enumerate(splits if rank < size else []):
            start = sum(split[:rank])
            inputs = make()
            for name in ("weight", "bias"):
                inputs[name] = inputs[name][start : start + split[rank]]
            found[f"{size}/{number}"] = run(
                linear_logprob, inputs, make_targets(), group=groups[size], vocab_start=start, **SPLIT_OPTIONS
            )

    def three(targets: list[int], starts: tuple[int, int, int]) -> Any:
        ones, group = torch.ones(len(targets), H), groups[3]
        return linear_logprob(
            ones, torch.ones(4, H), torch.tensor(targets), group=group, vocab_start=starts[rank]
        ).logprobs

    found["all ignored"] = three([-100, -100], (0, 4, 8)).tolist()
    found["past the end"] = refusal(lambda: three([3, 12], (0, 4, 8)))
    found["overlap"] = refusal(lambda: three([3], (0, 3, 7)))
    found["gap"] = refusal(lambda: three([3], (0, 4, 9)))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(3, _on_a_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("size", list(SPLITS))
def test_split_over_ranks_it_is_the_whole(ranks: list[dict[str, Any]], size: int) -> None:
    inputs = make()
    want = run(plain, in_fp64(inputs), make_targets(), **SPLIT_OPTIONS)
    bound = 2e-6 * max(1.0, largest_logit(inputs, SPLIT_OPTIONS))
    for number in range(len(SPLITS[size])):
        first, *others = (rank[f"{size}/{number}"] for rank in ranks[:size])
        for name in ("logprobs", "entropy", "dhidden"):  # the same on every rank, bit for bit
            assert all(torch.equal(first[name], other[name]) for other in others), name
        for name in ("logprobs", "entropy"):
            assert (first[name] - want[name]).abs().max() <= bound, name
        assert relative(first["dhidden"], want["dhidden"]) <= 1e-5
        for name in ("dweight", "dbias"):  # each rank has its own rows
            assert relative(torch.cat([part[name] for part in (first, *others)]), want[name]) <= 1e-5, name


def test_shards_and_targets_that_do_not_fit_are_told_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["all ignored"] == [0.0, 0.0]
        assert rank["past the end"] == "targets must be below 12, the ranks' vocabulary together, got 12"
        assert rank["overlap"] == "the ranks' parts of the vocabulary overlap: rank 1 starts at 3, rank 0 ends at 4"
        assert rank["gap"] == "the ranks' parts of the vocabulary leave a gap: rank 2 starts at 9, rank 1 ends at 8"


def test_eight_parts_merge_into_the_whole() -> None:
    """As eight ranks would, one after the other in this process; a target in the next part's range is not taken."""
    inputs, targets = make(), make_targets()
    rows = (targets != -100).nonzero()[:, 0]
    edges = torch.linspace(0, V, 9).long().tolist()
    parts = [
        cpu.state(inputs["hidden"][rows], inputs["weight"][a:b], inputs["bias"][a:b], targets[rows] - a, Head(), True)
        for a, b in itertools.pairwise(edges)
    ]
    top, total, numerator, chosen = merge(torch.stack(parts)).unbind(1)
    want = plain(**in_fp64(inputs), targets=targets, entropy=True)
    bound = 2e-6 * largest_logit(inputs, {})
    assert (chosen - top - total.log() - want.logprobs[rows]).abs().max() <= bound
    assert want.entropy is not None
    assert (total.log() - numerator / total - want.entropy[rows]).abs().max() <= bound
