"""What one rank alone finds wrong stops them all: each would wait for the others in a step that they never take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from gearshift.errors import UserError
from gearshift.rlhf.data.left_out import Encoded

Row = TypeVar("Row")


def of_every_rank(value: Any) -> list[Any]:
    """One value of each rank. Collective where there are ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def read_alike(field: str, read: Callable[[], Encoded[Row]]) -> Encoded[Row]:
    """`read()`, which every rank does for itself. Collective.

    Raises UserError on all ranks for one rank's UserError, and where ranks keep or leave out other rows (a file that is
    not the same on every host).
    """
    encoded, problem = None, None
    try:
        encoded = read()
    except UserError as error:
        problem = error
    found = (str(problem) if problem else "", len(encoded.rows) if encoded else 0, encoded.dropped if encoded else {})
    every = of_every_rank(found)
    if problem is not None:
        raise problem
    for rank, (told, rows, dropped) in enumerate(every):
        if told:
            raise UserError(f"{told} (on rank {rank})")
        if (rows, dropped) != every[0][1:]:
            raise UserError(
                f"{field}: rank {rank} keeps {rows:,} rows and rank 0 {every[0][1]:,}, or other ones: "
                "the files must be the same for every rank"
            )
    assert encoded is not None
    return encoded
