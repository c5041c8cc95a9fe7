"""Lists of tasks: in their order, by any number of threads, from several callers at once, in a forked process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gearshift.kernels import decode_step, native
from gearshift.kernels.native.tasks import Task, Tasks, structure

pytestmark = pytest.mark.skipif(native.built() is None, reason="the compiled library is not there")


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def doublings(x: Tensor, count: int) -> Tasks:
    """x ← x + x, `count` times: each reads what the one before it wrote, in parts that others may have written."""
    return Tasks(decode_step.sum_of(x, x, x)._replace(grain=1) for _ in range(count))


def test_a_task_sees_what_the_one_before_it_did(threads: int) -> None:
    for size in (1, 256, 5000):
        x = torch.ones(size)
        again = doublings(x, 40)
        for _ in range(3):
            again()
        assert torch.equal(x, torch.full((size,), 2.0**120))


def test_parts_of_one_task_are_read_by_all_of_the_next(threads: int) -> None:
    """Norms over whole rows of what was written in parts of 256 numbers."""
    x, weight = torch.randn(3, 2048), torch.ones(2048)
    doubled, normed = torch.empty_like(x), torch.empty_like(x)
    sums = decode_step.sum_of(x, x, doubled)._replace(grain=1)
    arguments = structure("Norm", "features i, x p, weight p, eps d, offset d, y p")(
        2048, doubled.data_ptr(), weight.data_ptr(), 1e-6, 0.0, normed.data_ptr()
    )
    steps = Tasks([sums, Task("step_norm", arguments, 3)] * 10)
    for _ in range(50):
        x.copy_(torch.randn_like(x))
        steps()
        assert torch.equal(normed, decode_step.norm(x + x, weight, 1e-6))


def test_callers_at_once(threads: int) -> None:
    """One has the helpers, the others do their lists alone."""
    found = [torch.ones(3000) for _ in range(4)]

    def run(x: Tensor) -> None:
        again = doublings(x, 10)
        for _ in range(10):
            again()

    callers = [threading.Thread(target=run, args=(x,)) for x in found]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(x, torch.full((3000,), 2.0**100)) for x in found)


def test_a_fork_has_helpers_of_its_own() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    x = torch.ones(5000)
    doublings(x, 3)()
    child = os.fork()
    if child == 0:
        doublings(x, 3)()
        os._exit(0 if bool((x == 64.0).all()) else 1)
    torch.set_num_threads(before)
    assert os.waitpid(child, 0)[1] == 0


def test_no_units(threads: int) -> None:
    x = torch.ones(0)
    doublings(x, 2)()
    Tasks([])()
