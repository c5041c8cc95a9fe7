"""Work that is spread over threads is done once each, by torch's own OpenMP threads or, without them, by others."""

from __future__ import annotations

import functools

import pytest
import torch

from gearshift.kernels import native, swiglu
from gearshift.kernels.swiglu import plain
from tests.kernels.threads import with_threads

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
