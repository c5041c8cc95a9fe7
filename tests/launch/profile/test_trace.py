"""Traces written by hand: what is an operator, what a collective, what neither."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from gearshift.launch.profile.trace import Operator, ranges, read_events

MAIN, GLOO, GPU = 1, 2, 7


def event(cat: str, name: str, start: float, end: float, thread: int = MAIN) -> dict[str, Any]:
    """From `start` to `end` seconds."""
    return {"ph": "X", "cat": cat, "name": name, "ts": start * 1e6, "dur": (end - start) * 1e6, "tid": thread}


def seconds(*parts: float) -> Any:
    return pytest.approx(parts, abs=1e-6)


def test_one_thread() -> None:
    """10 s: a product of 3 s with a copy of 1 s inside it, a collective of 2 s, and Python."""
    events = [
        event("user_annotation", "train", 0, 10),
        event("cpu_op", "aten::mm", 1, 4),
        event("cpu_op", "aten::copy_", 2, 3),
        event("cpu_op", "c10d::allreduce_", 5, 7),
        event("cpu_op", "aten::mm", 11, 12),  # after it
    ]
    (train,) = ranges(events, ["train", "score"])
    assert (train.seconds, train.computing, train.collectives, train.idle) == seconds(10, 3, 2, 5)
    assert train.operators == (
        Operator("aten::mm", 2.0, 1),
        Operator("c10d::allreduce_", 2.0, 1),
        Operator("aten::copy_", 1.0, 1),
    )


def test_a_collective_beside_the_thread_counts_where_no_operator_hides_it() -> None:
    events = [
        event("user_annotation", "train", 0, 10),
        event("cpu_op", "aten::mm", 0, 4),
        event("user_annotation", "gloo:all_gather", 3, 8, GLOO),
        event("cpu_op", "aten::copy_", 3, 5, GLOO),  # its own
    ]
    (train,) = ranges(events, ["train"])
    assert (train.computing, train.collectives, train.idle) == seconds(4, 4, 2)
    assert [operator.name for operator in train.operators] == ["aten::mm"]


def test_a_collective_inside_an_operator_is_one() -> None:
    """As of a head that is split over the vocabulary."""
    events = [
        event("user_annotation", "score", 0, 5),
        event("cpu_op", "gearshift::linear_logprob", 0, 4),
        event("cpu_op", "c10d::allreduce_", 1, 2),
    ]
    (score,) = ranges(events, ["score"])
    assert (score.computing, score.collectives, score.idle) == seconds(3, 1, 1)


def test_hooks_in_the_backward_pass_are_python() -> None:
    events = [
        event("user_annotation", "train", 0, 5),
        event("cpu_op", "autograd::engine::evaluate_function: _LinearBackward", 0, 5),
        event("cpu_op", "_LinearBackward", 1, 4),
        event("cpu_op", "aten::mm", 2, 3),
    ]
    (train,) = ranges(events, ["train"])
    assert (train.computing, train.collectives, train.idle) == seconds(1, 0, 4)


def test_ranges_of_one_name_are_one_phase() -> None:
    events = [
        event("user_annotation", "train/policy", 0, 2),
        event("user_annotation", "train/policy", 4, 7),
        event("cpu_op", "aten::mm", 1, 2),
        event("cpu_op", "aten::mm", 3, 4),  # between the two
        event("cpu_op", "aten::mm", 5, 6),
    ]
    (policy,) = ranges(events, ["train/policy"])
    assert (policy.seconds, policy.computing) == seconds(5, 2)
    assert policy.operators == (Operator("aten::mm", 2.0, 2),)


def test_with_a_gpu_its_time_counts() -> None:
    """Two kernels that overlap, NCCL half hidden behind one of them; what the host does meanwhile is not asked."""
    events = [
        event("user_annotation", "train", 0, 10),
        event("cpu_op", "aten::mm", 0, 9),
        event("kernel", "gemm", 1, 4, GPU),
        event("kernel", "softmax", 3, 5, GPU + 1),
        event("kernel", "ncclDevKernel_AllGather_RING_LL(int)", 4, 7, GPU + 2),
        event("gpu_memcpy", "Memcpy HtoD", 8, 9, GPU),
    ]
    (train,) = ranges(events, ["train"])
    assert (train.computing, train.collectives, train.idle) == seconds(5, 2, 3)
    assert {operator.name: operator.seconds for operator in train.operators} == {
        "gemm": 3.0,
        "ncclDevKernel_AllGather_RING_LL(int)": 3.0,
        "softmax": 2.0,
        "Memcpy HtoD": 1.0,
    }


def test_what_has_no_duration_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    kept = event("cpu_op", "aten::mm", 0, 1)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump({"traceEvents": [{"ph": "M", "name": "process_name"}, kept]}, file)
    assert read_events(path) == [kept]
