"""Attention of packed sequences on processors, against operations of torch in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gearshift.kernels import native
from gearshift.kernels.causal_attention import causal_attention, plain, serves

pytestmark = pytest.mark.skipif(native.built() is None, reason="no C compiler built the library")


def states(lengths: list[int], heads: int, kv_heads: int, size: int, value_size: int) -> list[Tensor]:
    """q, k and v as one projection has them in memory: heads side by side, tokens a whole row apart."""
    generator = torch.Generator().manual_seed(0)
    widths = [heads * size, kv_heads * size, kv_heads * value_size]
    whole = torch.randn(sum(lengths), sum(widths), generator=generator)
    parts = zip(whole.split(widths, 1), (size, size, value_size), strict=True)
    return [part.unflatten(1, (-1, n)).requires_grad_() for part, n in parts]


def results(function: object, inputs: list[Tensor], lengths: list[int], scaling: float) -> list[Tensor]:
    """The output and three gradients."""
    out = function(*inputs, lengths, scaling)  # type: ignore[operator]
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, slope)]


# Tiles are of 6 rows and 64 columns, blocks of 48 queries, vectors of 16 numbers: lengths on both sides of each.
@pytest.mark.parametrize("lengths", [[96] * 3, [129, 97, 64, 49, 48, 47, 17, 16, 7, 6, 5, 1], [1], [300, 2]])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "value_size"), [(6, 6, 64, 64), (4, 2, 16, 48), (3, 1, 80, 16)])
def test_as_in_fp64(lengths: list[int], heads: int, kv_heads: int, size: int, value_size: int) -> None:
    inputs = states(lengths, heads, kv_heads, size, value_size)
    assert serves(*inputs)
    found = results(causal_attention, inputs, lengths, size**-0.5)
    right = results(plain, [t.detach().double().requires_grad_() for t in inputs], lengths, size**-0.5)
    for own, other in zip(found, right, strict=True):
        assert own.dtype == torch.float32
        assert own.shape == other.shape
        assert float((own - other).abs().max()) <= 2e-6 * max(1.0, float(other.abs().max()))


def test_a_sequence_knows_nothing_of_the_others() -> None:
    """To the bit, with any number of threads."""
    lengths = [70, 33, 5]
    together = results(causal_attention, states(lengths, 4, 2, 32, 32), lengths, 0.2)
    slope = torch.randn(sum(lengths), 4, 32, generator=torch.Generator().manual_seed(1))
    inputs = [t.detach().split(lengths)[1].requires_grad_() for t in states(lengths, 4, 2, 32, 32)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        out = causal_attention(*inputs, [33], 0.2)
        alone = [out.detach(), *torch.autograd.grad(out, inputs, slope.split(lengths)[1])]
    finally:
        torch.set_num_threads(threads)
    for whole, own in zip(together, alone, strict=True):
        assert torch.equal(whole.split(lengths)[1], own)


def test_large_scores() -> None:
    """Exponentials of what is far apart neither overflow nor count: as close as torch comes in fp32."""
    lengths = [40, 20]
    inputs = [(30 * t.detach()).requires_grad_() for t in states(lengths, 2, 2, 16, 16)]
    right = results(plain, [t.detach().double().requires_grad_() for t in inputs], lengths, 1.0)
    found, theirs = (results(function, inputs, lengths, 1.0) for function in (causal_attention, plain))
    for own, other, wanted in zip(found, theirs, right, strict=True):
        assert float((own - wanted).abs().max()) <= 4 * float((other - wanted).abs().max())


def test_what_is_no_number_stays_none() -> None:
    """In the rows that see it: a run that diverges is noticed by it."""
    inputs = [t.detach() for t in states([5, 20], 2, 2, 16, 16)]
    inputs[1][7, 0, 3] = torch.nan
    out = causal_attention(*inputs, [5, 20], 0.2)
    assert out[7:, 0].isnan().all()
    assert out[:7].isfinite().all()
    assert out[:, 1].isfinite().all()


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((4, 2, 24), (4, 2, 24), (4, 2, 16)),  # a head of no whole vectors
        ((4, 3, 16), (4, 2, 16), (4, 2, 16)),  # heads that are no multiple
        ((4, 2, 16), (4, 2, 32), (4, 2, 16)),  # a key that is no query's
        ((4, 2, 16), (4, 2, 16), (4, 1, 16)),  # keys without a value
    ],
)
def test_what_it_does_not_serve(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    assert not serves(*(torch.zeros(shape) for shape in (q, k, v)))
    assert not serves(*(torch.zeros(4, 2, 16, dtype=torch.bfloat16) for _ in range(3)))


def test_what_cannot_be_is_told() -> None:
    inputs = states([5], 2, 2, 16, 16)
    with pytest.raises(ValueError, match=r"sequences of \[3\] tokens, 5 queries"):
        causal_attention(*inputs, [3], 1.0)
    with pytest.raises(ValueError, match="scaling must be above 0"):
        causal_attention(*inputs, [5], 0.0)


def test_on_no_device_shapes_alone() -> None:
    inputs = [t.detach().to("meta").requires_grad_() for t in states([5, 4], 4, 2, 16, 32)]
    out = causal_attention(*inputs, [5, 4], 1.0)
    assert out.shape == (9, 4, 32)
    assert [t.shape for t in torch.autograd.grad(out.sum(), inputs)] == [t.shape for t in inputs]
