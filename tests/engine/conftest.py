"""One group of two gloo ranks for each test file that asks for it."""

from collections.abc import Iterator

import pytest

from tests.worker_group import WorkerGroup


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[WorkerGroup]:
    group = WorkerGroup(2)
    yield group
    group.stop()
