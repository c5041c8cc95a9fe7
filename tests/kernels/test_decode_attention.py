"""`decode_attention` against a plain fp64 loop over rows and heads: compiled, by torch and by Triton."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.kernels import Columns, decode_attention, decode_attention_triton, native
from tests.kernels.devices import device

# The package's attribute of this name is the function.
MODULE = importlib.import_module("gearshift.kernels.decode_attention")
ROWS, CACHED, HEADS, KV_HEADS, CAPACITY = 5, 7, 6, 2, 40
SIZES = [(16, 16), (24, 5)]  # of key and value heads


@pytest.fixture(params=["compiled", "torch", "triton"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "built", lambda: None)
    if request.param == "triton":
        monkeypatch.setattr(MODULE, "implementation", lambda query: decode_attention_triton)
        monkeypatch.setattr(decode_attention_triton, "FEWEST", 16)  # so that there are several parts
    return str(request.param)


def run(way: str, inputs: dict[str, Any], **options: Any) -> Tensor:
    """On the device that the way is for; the inputs' cache is written as the call has written its own."""
    place = device() if way == "triton" else "cpu"
    moved = {name: value.to(place) for name, value in inputs.items() if isinstance(value, Tensor)}
    moved["columns"] = Columns(inputs["columns"].positions.to(place))
    out = decode_attention(**moved, **{k: v.to(place) if isinstance(v, Tensor) else v for k, v in options.items()})
    for name in ("keys", "values"):
        inputs[name].copy_(moved[name])
    return out.cpu()


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
    got = run(way, inputs, scaling=0.7, window=window, softcap=softcap, sinks=given)
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
    assert (run(way, inputs, scaling=0.25) - want).abs().max() <= 1e-6


def test_what_the_cache_holds_past_a_rows_position_is_not_read(way: str) -> None:
    inputs = make()
    want = by_hand(inputs, 0.25, None, None, None)
    for row, position in enumerate(inputs["columns"].positions.tolist()):
        inputs["keys"][row, :, position:] = 1e6
    assert (run(way, inputs, scaling=0.25) - want).abs().max() <= 1e-6


def test_a_rows_bits_do_not_depend_on_its_neighbours() -> None:
    if native.built() is None:
        pytest.skip("the compiled function was not built")
    inputs = make()
    whole = decode_attention(**inputs, scaling=0.25)
    for row in range(ROWS):
        one = {k: v[row : row + 1] for k, v in inputs.items() if k != "columns"}
        columns = Columns(inputs["columns"].positions[row : row + 1])
        assert torch.equal(decode_attention(**one, columns=columns, scaling=0.25), whole[row : row + 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_in_half_precision(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Weights and results are rounded once each, sums are not; a row without a position changes nothing and is 0."""
    monkeypatch.setattr(MODULE, "implementation", lambda query: decode_attention_triton)
    inputs = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in make().items()}
    want = by_hand(inputs, 0.7, None, None, None)
    inputs["columns"] = Columns(torch.tensor([0, CAPACITY - 1, 17, -1, 3]))
    before = inputs["keys"].clone()
    got = run("triton", inputs, scaling=0.7)
    kept = [0, 1, 2, 4]
    assert (got[kept] - want[kept]).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()
    assert torch.equal(got[3], torch.zeros_like(got[3]))
    assert torch.equal(inputs["keys"][3], before[3])


def test_triton_s_bits_do_not_depend_on_neighbours_of_the_same_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "implementation", lambda query: decode_attention_triton)
    inputs = make()
    whole = run("triton", inputs, scaling=0.25)
    order = torch.tensor([4, 2, 0, 1, 3])
    moved = {name: value[order] for name, value in inputs.items() if name in ("query", "key", "value")}
    moved |= {name: inputs[name][torch.cat([order, torch.tensor([5, 6])])] for name in ("keys", "values")}
    moved["columns"] = Columns(inputs["columns"].positions[order])
    assert torch.equal(run("triton", moved, scaling=0.25), whole[order])
