"""`decode_attention` against a plain fp64 loop over rows and heads: compiled, and through torch."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.kernels import Columns, decode_attention, native

# The package's attribute of this name is the function.
MODULE = importlib.import_module("gearshift.kernels.decode_attention")
ROWS, CACHED, HEADS, KV_HEADS, CAPACITY = 5, 7, 6, 2, 40
SIZES = [(16, 16), (24, 5)]  # of key and value heads


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "built", lambda: None)
    return str(request.param)


def make(key_size: int = 16, value_size: int = 16) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng)

    return {
        "query": noise(ROWS, HEADS, key_size),
        "key": noise(ROWS, KV_HEADS, key_size),
        "value": noise(ROWS, KV_HEADS, value_size),
        "keys": noise(CACHED, KV_HEADS, CAPACITY, key_size),
        "values": noise(CACHED, KV_HEADS, CAPACITY, value_size),
        "columns": Columns(torch.tensor([0, CAPACITY - 1, 17, 16, 3])),
    }


def by_hand(
    inputs: dict[str, Any], scaling: float, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """One row and head at a time, in fp64; the cache is left as it is."""
    out = []
    for row, position in enumerate(inputs["columns"].positions.tolist()):
        for head in range(HEADS):
            kv = head * KV_HEADS // HEADS
            low = 0 if window is None else max(0, position - window + 1)
            keys = torch.cat([inputs["keys"][row, kv, low:position], inputs["key"][row, kv][None]]).double()
            values = torch.cat([inputs["values"][row, kv, low:position], inputs["value"][row, kv][None]]).double()
            scores = scaling * keys @ inputs["query"][row, head].double()
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head].double()[None]])
            out.append(scores.softmax(-1)[: len(values)] @ values)
    return torch.stack(out).view(ROWS, HEADS, -1)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 8, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_matches_fp64(way: str, sizes: tuple[int, int], window: int | None, softcap: float | None, sinks: bool) -> None:
    inputs = make(*sizes)
    given = torch.linspace(-2, 3, HEADS) if sinks else None
    want = by_hand(inputs, 0.7, window, softcap, given)
    before = {name: inputs[name].clone() for name in ("keys", "values")}
    got = decode_attention(**inputs, scaling=0.7, window=window, softcap=softcap, sinks=given)
    assert (got - want).abs().max() <= 1e-6 * want.abs().max().clamp(min=1.0)
    for name, new in (("keys", "key"), ("values", "value")):
        before[name][range(ROWS), :, inputs["columns"].positions] = inputs[new]
        assert torch.equal(inputs[name], before[name]), "only the new entries are written"


def test_strided_inputs(way: str) -> None:
    """As models give them: heads transposed out of a projection."""
    inputs = make()
    want = by_hand(inputs, 0.25, None, None, None)
    for name in ("query", "key", "value"):
        inputs[name] = inputs[name].transpose(0, 1).contiguous().transpose(0, 1)
    assert (decode_attention(**inputs, scaling=0.25) - want).abs().max() <= 1e-6


def test_what_the_cache_holds_past_a_rows_position_is_not_read(way: str) -> None:
    inputs = make()
    want = by_hand(inputs, 0.25, None, None, None)
    for row, position in enumerate(inputs["columns"].positions.tolist()):
        inputs["keys"][row, :, position:] = 1e6
    assert (decode_attention(**inputs, scaling=0.25) - want).abs().max() <= 1e-6


def test_a_rows_bits_do_not_depend_on_its_neighbours() -> None:
    if native.built() is None:
        pytest.skip("the compiled function was not built")
    inputs = make()
    whole = decode_attention(**inputs, scaling=0.25)
    for row in range(ROWS):
        one = {k: v[row : row + 1] for k, v in inputs.items() if k != "columns"}
        columns = Columns(inputs["columns"].positions[row : row + 1])
        assert torch.equal(decode_attention(**one, columns=columns, scaling=0.25), whole[row : row + 1])
