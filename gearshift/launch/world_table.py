"""Which rank is where, in which groups: said at the start, and checked against what tensor parallelism needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from gearshift.engine.placement import Placement, named
from gearshift.errors import SettingError

MOST_ROWS = 8


def check_tensor_parallel(tp_size: int, ranks_of: Mapping[str, int]) -> str:
    """Raises SettingError when a group would lie across two hosts that need not; returns a warning where it must."""
    if len(ranks_of) < 2 or tp_size == 1:
        return ""
    least = min(ranks_of, key=lambda host: ranks_of[host])
    if tp_size > ranks_of[least]:
        return (
            f"rollout.tp_size {tp_size} is more than the {_ranks(ranks_of[least])} of {least}: "
            "groups lie across hosts, and every layer of a rollout waits for the network"
        )
    for host, count in ranks_of.items():
        if count % tp_size:
            raise SettingError(
                "rollout.tp_size",
                f"{tp_size} does not divide the {_ranks(count)} of {host}: a group would lie across hosts: "
                "change its slots in the hostfile or this",
            )
    return ""


def world_table(hosts: Sequence[str], tp_size: int) -> list[str]:
    """`hosts[rank]`: one line on one host; on several a table, of which the middle is left out where it is long."""
    runs = [(host, [rank for rank, _ in run]) for host, run in groupby(enumerate(hosts), key=lambda pair: pair[1])]
    if len(runs) == 1:
        return []
    placement = Placement(len(hosts), tp_size, len(runs[0][1]))
    rows = [("host", "ranks", f"TP groups of {tp_size}", "ZeRO-3 group")]
    for host, ranks in runs:
        groups = sorted({placement.group_of(rank) for rank in ranks})
        rows.append((host, _span(ranks), _span(groups), f"0 to {len(hosts) - 1} (all)"))
    if len(runs) > MOST_ROWS:
        left_out = len(runs) - MOST_ROWS + 1
        rows[MOST_ROWS - 1 : -1] = [(f"... {left_out} more", "", "", "")]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [f"{'world' if i == 0 else '':<13}{line}" for i, line in enumerate(lines)]


def _span(numbers: Sequence[int]) -> str:
    return named(list(numbers)).partition(" ")[2]


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count != 1 else ''}"
