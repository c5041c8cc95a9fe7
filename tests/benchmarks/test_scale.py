"""The arithmetic of `benchmarks/scale.py`, on shapes small enough to work out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scale import shapes_of, shift_of, table
from benchmarks.scale_model import (
    Models,
    Prediction,
    Rates,
    Shape,
    Work,
    best,
    forward,
    generation,
    micro_rows_of,
    predicted,
    slots_of,
    training,
)
from benchmarks.scale_plot import STACK, draw, seconds_of
from benchmarks.scale_published import PUBLISHED, SETTINGS, SHAPES

# Powers of ten: 100 TFLOP/s, 1 TB/s, 100 GB/s within a host of 2 and 10 between, all reached, nothing else.
RATES = Rates(
    100, 1000, 80, 100, 10, per_host=2, forward_share=1, training_share=1, memory_share=1, link_share=1, latency=0,
    overlap=1, layer=0, step=0,
)  # fmt: skip
SHAPE = Shape(100, 400, 2, 10, 5, 1000)
WORK = Work(8, 30, 10, 2)
MODELS = Models(SHAPE, SHAPE, SHAPE)
BODY, HEAD = 2 * (2 * 100 * 150 + 3 * 100 * 400), 100_000


def no_shift(ranks: int, tp_size: int) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("model", "billions"),
    [("llama-3-8b", 8.03), ("llama-3-70b", 70.55), ("llama-2-7b", 6.74), ("opt-13b", 12.84), ("opt-66b", 65.7)],
)
def test_shapes_have_the_parameters_of_their_models(model: str, billions: float) -> None:
    assert SHAPES[model].total / 1e9 == pytest.approx(billions, rel=0.005)


def test_flops_and_bytes_of_a_shape() -> None:
    assert (SHAPE.body, SHAPE.head, SHAPE.total) == (BODY, HEAD, BODY + 2 * HEAD)
    assert SHAPE.forward_flops(40, 10) == 2 * BODY * 40 + 2 * 2 * 100 * 40**2 + 2 * HEAD * 10
    assert SHAPE.cache_bytes(1) == 2 * 2 * 2 * 50
    assert SHAPE.cache_bytes(10) == 2 * 2 * 2 * 10  # one head on every rank, though there are but 5


def test_collectives() -> None:
    size = 1e9
    assert RATES.collective(size, 1) == 0
    assert RATES.collective(size, 2) == pytest.approx(size / 2 / 100e9)
    assert RATES.collective(size, 8) == pytest.approx(size * 3 / 4 / 20e9)  # 3 of 4 hosts' parts, by two cards
    assert replace(RATES, latency=10).collective(0, 8, messages=4) == pytest.approx(4 * 3 * 10e-6)
    assert RATES.summed(size, 2) == pytest.approx(size / 100e9)


def test_what_overlaps() -> None:
    assert [replace(RATES, overlap=part).joined(3, 2) for part in (0, 0.5, 1)] == [5, 4, 3]


def test_decoding_reads_the_weights_and_the_cache_in_every_step() -> None:
    """2 GPUs, each alone with 4 rows, 2 at once: two waves of 10 steps."""
    _, decode = generation(SHAPE, WORK, RATES, 2, 1, 2)
    read = 2 * (BODY + HEAD) + 2 * (30 + 5) * 400
    assert decode.seconds == pytest.approx(20 * read / 1e12)
    assert decode.limit == "memory bandwidth"
    prefill, fast = generation(SHAPE, WORK, replace(RATES, memory_gbs=1e9), 2, 1, 2)
    assert prefill.seconds == pytest.approx(4 * (2 * BODY * 30 + 2 * 2 * 100 * 900 + 2 * HEAD) / 1e14)
    assert fast.seconds == pytest.approx(20 * 2 * (2 * (BODY + HEAD) + 4 * 2 * 100 * 35) / 1e14)
    assert fast.limit == "flops"


@pytest.mark.parametrize("memory", [1000.0, 1e9], ids=["memory bandwidth", "flops"])
def test_a_group_shares_the_work_and_sums_every_layer_twice(memory: float) -> None:
    """2 GPUs together with 8 rows, 4 at once: two waves."""
    rates = replace(RATES, memory_gbs=memory, link_share=0.5, latency=10, step=100)
    prefill, decode = generation(SHAPE, WORK, rates, 2, 2, 4)

    def sums(rows: int) -> float:
        return 2 * 2 * (2 * 100 * rows / 50e9 + 10e-6)

    flops, read = 8 * SHAPE.forward_flops(30, 1) / 2 / 1e14, 2 * (BODY + HEAD) / (memory * 1e9)
    assert prefill.seconds == pytest.approx(max(flops, read) + 2 * sums(4 * 30), rel=1e-9)
    flops = 4 * (2 * (BODY + HEAD) + 4 * 2 * 100 * 35) / 2 / 1e14
    read = (BODY + HEAD + 4 * 35 * SHAPE.cache_bytes(2)) / (memory * 1e9)
    assert decode.seconds == pytest.approx(20 * (max(flops, read) + sums(4) + 100e-6), rel=1e-9)


def test_python_takes_its_time_for_each_layer_and_micro_batch() -> None:
    slow = replace(RATES, layer=1000)
    scoring = forward("critic", SHAPE, WORK, replace(slow, micro_rows=2), 2, 0)
    assert (scoring.limit, scoring.seconds) == ("host", pytest.approx(2 * 2 * 1e-3))
    trained = training("policy", SHAPE, WORK, slow, 2, 1, 10)
    assert trained.seconds == pytest.approx(4 * 3 * 2 * 1e-3 + 2 * 38 * SHAPE.total / 2 / 1e12)


def test_scoring_gathers_for_each_micro_batch() -> None:
    """4 rows a rank, in 2 micro-batches; the links take longest."""
    term = forward("critic", SHAPE, WORK, replace(RATES, micro_rows=2), 2, 0)
    assert term.limit == "links"
    assert term.seconds == pytest.approx(2 * 2 * SHAPE.total / 2 / 100e9)
    alone = forward("critic", SHAPE, WORK, RATES, 1, 0)
    assert (alone.limit, alone.seconds) == ("flops", pytest.approx(8 * SHAPE.forward_flops(40) / 1e14))


def test_training_runs_four_forwards_worth_and_reduces_in_fp32() -> None:
    term = training("policy", SHAPE, WORK, replace(RATES, overlap=0), 2, 1, 10)
    computing = 4 * 4 * SHAPE.forward_flops(40, 10) / 1e14
    links = 4 * (2 * 2 + 4) * SHAPE.total / 2 / 100e9  # 2 updates of 2 micro-batches
    steps = 2 * 38 * SHAPE.total / 2 / 1e12
    assert term.seconds == pytest.approx(computing + links + steps)
    assert training("policy", SHAPE, WORK, RATES, 2, 1, 10).seconds == pytest.approx(max(computing, links) + steps)


def test_memory_bounds_slots_and_micro_batches() -> None:
    state = SHAPE.total * (22 + 2 + 18 + 2)
    room = (state + 2 * SHAPE.total + 3 * 400 * 40) / 1e9
    tight = replace(RATES, room=0, memory_gb=room + 1e-9)
    assert slots_of(MODELS, WORK, tight, 1, 1, False) == 3
    assert slots_of(MODELS, WORK, tight, 1, 1, True) == 8
    row = 2 * 40 * 100 * 2 + 40 * (12 * 400 + 16 * 100)
    assert micro_rows_of(MODELS, WORK, replace(tight, memory_gb=(state + 2.5 * row) / 1e9), 1) == 2
    assert predicted(MODELS, WORK, replace(tight, memory_gb=state / 2e9), 1, 1, no_shift) is None
    assert best(MODELS, WORK, replace(tight, memory_gb=state / 2e9), 1, no_shift) is None
    found = predicted(MODELS, WORK, replace(tight, link_share=0.5), 1, 1, lambda ranks, tp_size: 3.0)
    assert found is not None
    shift = {term.name: term.seconds for term in found.terms if term.part == "shift"}
    moved = 2 * 16 * SHAPE.total  # fp32 weights, two moments and the average, there and back
    assert shift == {"weights": 6.0, "optimizer to the host and back": pytest.approx(moved / 12.5e9)}


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, kv_heads=10, gated=False, tied=True)], ids=["llama", "opt"])
@pytest.mark.parametrize(("per_host", "rate"), [(2, 100e9), (1, 10e9)])
def test_a_shift_of_two_ranks_brings_each_the_half_that_it_lacks(shape: Shape, per_host: int, rate: float) -> None:
    shapes, _ = shapes_of(shape, 1)
    halves = sum(-(-math.prod(sizes) // 2) for sizes in shapes.values())
    assert shift_of(shape, replace(RATES, per_host=per_host))(2, 1) == pytest.approx(2 * halves / rate, rel=0.01)


def test_a_line_of_the_table_adds_up() -> None:
    found, setting = of("llama-3-8b", 8), SETTINGS["hybridflow"]
    _, line, other = table("llama-3-8b", setting, [found, None], (8, 16))
    *parts, total, rate = (float(word.replace(",", "")) for word in line.split()[2:10])
    assert total == pytest.approx(sum(parts), abs=0.04)
    assert rate == pytest.approx(1024 * 2048 / total / 8, rel=0.01)
    assert other.startswith("     16 GPUs   no room")


def of(model: str, ranks: int) -> Prediction:
    shape = SHAPES[model]
    setting = SETTINGS["hybridflow"]
    found = best(Models(shape, shape, shape), setting.work, Rates(989, 3350, 80, 450, 50), ranks, no_shift)
    assert found is not None
    return found


@pytest.mark.parametrize(("model", "first"), [("llama-3-8b", 8), ("llama-3-70b", 64)])
def test_more_gpus_take_less_time_and_more_of_it_in_all(model: str, first: int) -> None:
    counts = [n for n in (8, 16, 32, 64, 128, 256, 512, 1024) if n >= first]
    seconds = [of(model, ranks).seconds for ranks in counts]
    assert seconds == sorted(seconds, reverse=True)
    spent = [ranks * each for ranks, each in zip(counts, seconds, strict=True)]
    assert spent == sorted(spent)


def test_terms_add_up() -> None:
    found = of("llama-3-8b", 64)
    assert found.seconds == pytest.approx(sum(found.part(p) for p in ("generation", "shift", "scoring", "training")))
    assert found.seconds == pytest.approx(sum(seconds_of(found, name) for name in STACK))
    assert found.micro_rows * 64 <= 1024 // found.updates
    assert of("llama-3-8b", 1024).updates == 1


def test_the_tensor_parallel_size_is_the_one_that_takes_least_time() -> None:
    shape, rates = SHAPES["llama-3-8b"], Rates(989, 3350, 80, 450, 50)
    models, work = Models(shape, shape, shape), SETTINGS["hybridflow"].work
    each = [predicted(models, work, rates, 32, t, no_shift) for t in (1, 2, 4, 8)]
    assert of("llama-3-8b", 32) == min((one for one in each if one), key=lambda one: one.seconds)


def test_published_parts_add_up_to_the_published_totals() -> None:
    """Those of OpenRLHF's table 2."""
    totals = {(p.system, p.model): p.seconds for p in PUBLISHED if p.setting == "openrlhf"}
    assert totals["OpenRLHF", "llama-2-7b"] == pytest.approx(471.11)
    assert totals["OpenRLHF", "llama-2-70b"] == pytest.approx(4488.53)
    assert totals["DeepSpeed-Chat, tuned", "llama-2-70b"] == pytest.approx(10407.0)
    assert {p.model for p in PUBLISHED} <= set(SHAPES)


def test_the_figure_is_drawn_where_some_do_not_fit(tmp_path: Path) -> None:
    rows = {"llama-3-8b": [of("llama-3-8b", 8), of("llama-3-8b", 16)], "llama-3-70b": [None, of("llama-3-70b", 64)]}
    draw({"hybridflow": rows}, [(one, None) for one in PUBLISHED], (8, 16), tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 10_000
