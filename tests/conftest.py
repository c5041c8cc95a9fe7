"""For every test: small thread pools, no network (set before torch is imported anywhere), and groups of real ranks.

Ranks are processes of gloo on the CPU, also where there are GPUs. Triton's kernels are interpreted on CPU tensors.
"""

import os
from collections.abc import Iterator

import pytest

from tests.worker_group import WorkerGroup

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def one_rank() -> Iterator[WorkerGroup]:
    """A world of one gloo rank for each test file that asks for it."""
    group = WorkerGroup(1)
    yield group
    group.stop()


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[WorkerGroup]:
    """A world of two gloo ranks for each test file that asks for it."""
    group = WorkerGroup(2)
    yield group
    group.stop()


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[WorkerGroup]:
    """A world of four gloo ranks for each test file that asks for it."""
    group = WorkerGroup(4)
    yield group
    group.stop()
