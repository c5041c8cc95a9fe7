"""Work that is spread over threads is done once each, by torch's own OpenMP threads or, without them, by others; and by
the library for every kind of processor."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gearshift.kernels import few_rows_linear, native, swiglu
from gearshift.kernels.causal_attention import causal_attention
from gearshift.kernels.causal_attention import plain as attention
from gearshift.kernels.linear_logprob_cpu import _chunk_state
from gearshift.kernels.native import tasks
from gearshift.kernels.rms_norm import rms_norm
from gearshift.kernels.squared_norm import squared_norm
from gearshift.kernels.swiglu import plain
from tests.kernels.threads import with_threads

few_rows = importlib.import_module("gearshift.kernels.few_rows_linear")  # the package's name of it is the function
GATE, UP = torch.randn(2, native.WORTH_THREADS + 4097, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("openmp", [True, False])
def test_every_part_is_done(threads: int, openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native._parallel() is not None
    if not openmp:
        monkeypatch.setattr(native, "_parallel", lambda: None)
    found = with_threads(threads, functools.partial(swiglu, GATE, UP))
    assert torch.allclose(found, plain(GATE, UP), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_call_that_was_noted_can_be_made_again(threads: int) -> None:
    """With tensors that hold something else by then: recorded steps do so."""
    calls, gate = [], GATE.clone()
    with native.noted(lambda name, call: calls.append((name, call))):
        found = with_threads(threads, functools.partial(swiglu, gate, UP))
    [(name, call)] = calls
    assert name == "swiglu"
    gate.neg_()
    call()
    assert torch.allclose(found, plain(-GATE, UP), rtol=1e-6, atol=1e-6)


def results(exact: bool) -> dict[str, Tensor]:
    """Of functions that are written in vectors, at sizes that are no multiples of one; `exact`: by torch in fp64."""
    g = torch.Generator().manual_seed(0)
    shapes = (5, 77), (77,), (19, 300), (41, 300), (2, 1003), (3, 37, 2, 16), (37, 2, 16)
    given = [torch.randn(shape, generator=g) for shape in shapes]
    x, weight, few, many, z, qkv, slope = [t.double() for t in given] if exact else given
    states, column = [t.requires_grad_() for t in qkv.unbind()], torch.tensor([7, 1002])
    if exact:
        out = attention(*states, [20, 17], 0.25)
        gap = z - z.amax(1, keepdim=True)
        sums = [z.amax(1), gap.exp().sum(1), (gap.exp() * gap).sum(1), z.gather(1, column[:, None])[:, 0]]
        found = {
            "swiglu": plain(x, weight),
            "rms_norm": x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight,
            "squared_norm": x.square().sum(),
            "few_rows_linear": few @ many.t(),
            "states of logits": torch.stack(sums, 1),
        }
    else:
        out = causal_attention(*states, [20, 17], 0.25)
        found = {
            "swiglu": swiglu(x, weight.expand_as(x).contiguous()),
            "rms_norm": rms_norm(x, weight, 1e-6),
            "squared_norm": squared_norm(x),
            "few_rows_linear": few_rows_linear(few, many),
            "states of logits": _chunk_state(z, column, True),
        }
    gradients = torch.autograd.grad(out, states, slope)
    return found | {"attention": out.detach()} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))


KEPT = native.built, native.function, tasks._address, few_rows.tile


@pytest.fixture
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """In place of the one that is best for this processor, if it can run it."""
    here = torch.backends.cpu.get_cpu_capability()
    if request.param not in native.LIBRARIES.get(here, ("_plain",)):
        pytest.skip(f"not for a processor with {here}")
    for kept in KEPT:
        kept.cache_clear()
    monkeypatch.setitem(native.LIBRARIES, here, (request.param,))
    yield request.param
    for kept in KEPT:
        kept.cache_clear()


@pytest.mark.parametrize("library", ["_plain", "_avx2", "_avx512"], indirect=True)
def test_the_libraries_for_all_kinds_of_processors_are_right(library: str) -> None:
    loaded, found, right = native.built(), results(exact=False), results(exact=True)
    assert loaded is not None
    assert f"{library}." in loaded._name
    for name, own in found.items():
        assert (own - right[name]).abs().max() <= 2e-6 * right[name].abs().max(), name


def test_the_environment_may_ask_for_a_lesser_kind() -> None:
    code = "from gearshift.kernels import native; print(native.built()._name)"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "_plain." in done.stdout
