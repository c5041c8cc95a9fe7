"""Which families' rotary embedding the GPU kernel serves, and that it gives what theirs does; interpreted here."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from gearshift.engine import rotary

CPU = torch.device("cpu")


def own_of(family: str) -> Any:
    found = importlib.import_module(f"transformers.models.{family}.modeling_{family}").apply_rotary_pos_emb
    return getattr(found, "own", found)


def step(rows: int = 3) -> list[torch.Tensor]:
    shapes = ((rows, 4, 1, 8), (rows, 2, 1, 8), (rows, 1, 8), (rows, 1, 8))
    return [torch.randn(*shape, generator=torch.Generator().manual_seed(n)) for n, shape in enumerate(shapes)]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2", "gpt_neox", "phi3", "olmo2"])
def test_halves_are_served(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = own_of(family)
    assert rotary._agrees(own, torch.float32, CPU, rotary._turned)
    monkeypatch.setattr(rotary, "_is_step", lambda *given: True)
    with torch.no_grad():
        for found, want in zip(rotary._with_steps(own)(*step()), own(*step()), strict=True):
            assert torch.allclose(found, want, atol=1e-6)


@pytest.mark.parametrize("family", ["cohere", "glm", "ernie4_5"])
def test_neighbours_are_not(family: str) -> None:
    assert not rotary._agrees(own_of(family), torch.float32, CPU, rotary._turned)


def test_all_else_goes_to_the_family_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, several positions, other arguments; and a processor."""
    own = own_of("llama")
    apply, (q, k, cos, sin) = rotary._with_steps(own), step()
    monkeypatch.setattr(rotary, "_turned", lambda *given: pytest.fail("not a step on a GPU"))
    with torch.no_grad():
        assert torch.equal(apply(q, k, cos, sin)[0], own(q, k, cos, sin)[0])
        monkeypatch.setattr(rotary, "_is_step", lambda q, *rest: q.shape[2] == 1)
        longer = [x.expand(*x.shape[:-2], 5, 8) for x in (q, k, cos, sin)]
        assert torch.equal(apply(*longer)[0], own(*longer)[0])
        assert torch.equal(apply(q, k, cos, sin, unsqueeze_dim=1)[0], own(q, k, cos, sin)[0])
    assert torch.equal(apply(q, k, cos, sin)[0], own(q, k, cos, sin)[0])


def sequences(rows: int = 2) -> list[torch.Tensor]:
    return [x[:rows].expand(*x[:rows].shape[:-2], 5, 8).contiguous() for x in step()]


def test_whole_sequences_on_a_processor_are_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every row, or with one row of angles for all; a single position, another type, angles that learn and other
    arguments go to the file's own."""
    own = own_of("llama")
    apply, (q, k, cos, sin) = rotary._with_sequences(own), sequences()
    served: list[int] = []
    monkeypatch.setattr(rotary, "rotary", lambda q, k, cos, sin: served.append(len(cos)) or own(q, k, cos, sin))
    apply(q, k, cos, sin)
    apply(q, k, cos[:1], sin[:1])
    assert served == [2, 1]
    for given in (
        [x[..., :1, :] for x in (q, k, cos, sin)],
        [x.double() for x in (q, k, cos, sin)],
        [q, k, cos.clone().requires_grad_(), sin],
        [q, k, cos, sin, 1],
    ):
        apply(*given)
    assert served == [2, 1]
