"""`linear_logprob` against its fp64 definition, at the edges of its contract, and split over two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gearshift.kernels import linear_logprob
from gearshift.kernels.head import CHUNK, Head
from gearshift.kernels.linear_logprob import plain
from gearshift.kernels.linear_logprob_chunked import chunked

T, H, V = 23, 16, 2 * CHUNK + 809  # three chunks, the last one partial
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"scale": 0.0625, "temperature": 1.3},
    {"softcap": 5.0},
    {"scale": 1.5, "softcap": 3.0, "temperature": 0.8},
]


def make(dtype: torch.dtype = torch.float32, size: float = 1.0, bias: bool = True) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    inputs = {
        "hidden": size * torch.randn(T, H, generator=rng),
        "weight": torch.randn(V, H, generator=rng),
    }
    if bias:
        inputs["bias"] = torch.randn(V, generator=rng)
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def make_targets() -> Tensor:
    targets = torch.randint(V, (T,), generator=torch.Generator().manual_seed(1))
    targets[[0, 1, 2]] = torch.tensor([0, CHUNK, V - 1])  # the edges of chunks
    targets[[4, 9, T - 1]] = -100
    return targets


def run(function: Any, inputs: dict[str, Tensor], targets: Tensor, **options: Any) -> dict[str, Tensor]:
    """Values and, for random incoming gradients, the gradients of every input."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    result = function(**leaves, targets=targets, **options)
    out = {name: value for name, value in result._asdict().items() if value is not None}
    rng = torch.Generator().manual_seed(2)
    loss = sum((value.double() * torch.randn(len(targets), generator=rng, dtype=torch.float64)).sum()
               for value in out.values())  # fmt: skip
    loss.backward()
    return {k: v.detach() for k, v in out.items()} | {"d" + k: v.grad for k, v in leaves.items()}


def in_fp64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in inputs.items()}


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def largest_logit(inputs: dict[str, Tensor], options: dict[str, Any]) -> float:
    head = Head(**{k: v for k, v in options.items() if k != "entropy"})
    product = inputs["hidden"].double() @ inputs["weight"].double().T
    z = head.logits(product + inputs.get("bias", torch.zeros(1)).double())
    return float(z[z.isfinite()].abs().max())


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fp32_matches_the_fp64_definition(options: dict[str, Any], bias: bool, entropy: bool) -> None:
    inputs, targets = make(bias=bias), make_targets()
    options = options | {"entropy": entropy}
    got, want = run(linear_logprob, inputs, targets, **options), run(plain, in_fp64(inputs), targets, **options)
    assert set(got) == set(want)
    assert ("entropy" in got) == entropy
    bound = 2e-6 * max(1.0, largest_logit(inputs, options))
    for name in got:
        assert got[name].dtype == torch.float32
        if name.startswith("d"):
            assert relative(got[name], want[name]) <= 1e-5, name
        else:
            assert (got[name] - want[name]).abs().max() <= bound, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_lose_only_the_rounding_of_their_gradients(dtype: torch.dtype) -> None:
    inputs, targets = make(dtype), make_targets()
    options = {"temperature": 0.9, "entropy": True}
    got, want = run(linear_logprob, inputs, targets, **options), run(plain, in_fp64(inputs), targets, **options)
    for name in ("logprobs", "entropy"):
        assert got[name].dtype == torch.float32
        assert (got[name] - want[name]).abs().max() <= 2e-6 * largest_logit(inputs, options), name
    # One rounding: half an ulp, 2^-9 in bf16 and 2^-12 in fp16 at most. Elements below fp16's normal range (6e-5)
    # lose up to 3e-8 each instead.
    half_ulp = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}[dtype]
    for name, tensor in inputs.items():
        error = (got["d" + name].double() - want["d" + name]).norm()
        flat = 3e-8 * tensor.numel() ** 0.5 if dtype == torch.float16 else 0.0
        assert got["d" + name].dtype == dtype
        assert error <= (half_ulp + 1e-5) * want["d" + name].norm() + flat, name


def small(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    rng = torch.Generator().manual_seed(3)
    shapes = [(5, 4), (11, 4), (11,)]
    tensors = [torch.randn(shape, generator=rng, dtype=dtype).requires_grad_() for shape in shapes]
    return tensors, torch.tensor([0, 10, -100, 4, 5])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_of_the_definition_and_of_the_chunks(softcap: float | None) -> None:
    tensors, targets = small()
    head = Head(0.8, softcap, 0.7)

    def by_definition(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return plain(hidden, weight, targets, bias=bias, scale=0.8, softcap=softcap, temperature=0.7, entropy=True)

    def by_chunks(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        rows = (targets != -100).nonzero()[:, 0]
        return chunked(hidden, weight, bias, targets, rows, head, True, None, 0, width=4)

    assert torch.autograd.gradcheck(by_definition, tensors)
    assert torch.autograd.gradcheck(by_chunks, tensors)
    torch.testing.assert_close(by_chunks(*tensors), tuple(by_definition(*tensors)), rtol=0, atol=1e-13)


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


def test_never_holds_the_logits() -> None:
    tokens, vocab = 64, 5 * CHUNK
    hidden, weight = torch.randn(tokens, 8), torch.randn(vocab, 8)
    targets = torch.arange(tokens)
    with Allocations() as seen:
        run(linear_logprob, {"hidden": hidden, "weight": weight}, targets, softcap=9.0, entropy=True)
    assert seen.largest <= max(tokens * CHUNK, vocab * 8) < tokens * vocab / 4
    with Allocations() as seen:
        run(plain, {"hidden": hidden, "weight": weight}, targets)
    assert seen.largest >= tokens * vocab


@pytest.mark.parametrize(("frozen", "products"), [((), 9), (("weight",), 6), (("hidden",), 6)])
def test_a_frozen_input_costs_no_gradient(frozen: tuple[str, ...], products: int) -> None:
    """Three chunks: three products each for the forward, its recomputation is two more with dX and dW."""
    inputs, targets = make(bias=False), make_targets()
    for name, tensor in inputs.items():
        tensor.requires_grad_(name not in frozen)
    logprobs, _ = linear_logprob(inputs["hidden"], inputs["weight"], targets)
    with Allocations() as seen:
        logprobs.sum().backward()
    assert seen.products == products
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


SPLITS = [(6000, V - 6000), (0, V), (V - 1, 1)]
SPLIT_OPTIONS = {"scale": 1.1, "softcap": 6.0, "temperature": 0.9, "entropy": True}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group, results = dist.group.WORLD, []
    for split in SPLITS:
        start = sum(split[:rank])
        inputs = make()
        for name in ("weight", "bias"):
            inputs[name] = inputs[name][start : start + split[rank]]
        results.append(run(linear_logprob, inputs, make_targets(), group=group, vocab_start=start, **SPLIT_OPTIONS))
    lost = linear_logprob(torch.ones(2, H), torch.ones(4, H), torch.tensor([8, 3]), group=group, vocab_start=4 * rank)
    none = linear_logprob(torch.ones(1, H), torch.ones(4, H), torch.tensor([-100]), group=group, vocab_start=4 * rank)
    torch.save((results, lost.logprobs, none.logprobs), f"{folder}/rank{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}") for rank in range(2)]


def test_split_over_two_ranks_it_is_the_whole(two_ranks: list[Any]) -> None:
    inputs = make()
    want = run(plain, in_fp64(inputs), make_targets(), **SPLIT_OPTIONS)
    bound = 2e-6 * max(1.0, largest_logit(inputs, SPLIT_OPTIONS))
    for left, right in zip(two_ranks[0][0], two_ranks[1][0], strict=True):
        for name in ("logprobs", "entropy", "dhidden"):  # the same on both ranks, bit for bit
            assert torch.equal(left[name], right[name]), name
        for name in ("logprobs", "entropy"):
            assert (left[name] - want[name]).abs().max() <= bound, name
        assert relative(left["dhidden"], want["dhidden"]) <= 1e-5
        for name in ("dweight", "dbias"):  # each rank has its own rows
            assert relative(torch.cat([left[name], right[name]]), want[name]) <= 1e-5, name


def test_a_target_that_no_rank_holds_is_not_a_number(two_ranks: list[Any]) -> None:
    for _, lost, none in two_ranks:
        assert lost[0].isnan()
        assert torch.isclose(lost[1], torch.tensor(1 / 8).log())
        assert none.tolist() == [0.0]
