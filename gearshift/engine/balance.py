"""Rows of unequal length dealt out so that no part waits for another: to ranks, and to the micro-batches of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def balanced(sizes: Sequence[int], parts: int, most_rows: int | None = None) -> list[list[int]]:
    """Row numbers of each part, ascending: the largest row left goes to the part that has least (LPT, Graham 1969).

    `most_rows`: of a part; None: any. As many rows as parts or more leave no part empty.
    """
    rows: list[list[int]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for row in sorted(range(len(sizes)), key=lambda row: (-sizes[row], row)):
        open_parts = (part for part in range(parts) if most_rows is None or len(rows[part]) < most_rows)
        least = min(open_parts, key=lambda part: (totals[part], len(rows[part]), part))
        rows[least].append(row)
        totals[least] += sizes[row]
    return [sorted(part) for part in rows]


def by_length(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Parts of about equally many rows, those of like length together: the least padding."""
    order = sorted(range(len(sizes)), key=lambda row: (-sizes[row], row))
    cuts = [len(order) * part // parts for part in range(parts + 1)]
    return [sorted(order[low:high]) for low, high in pairwise(cuts)]


def parts_needed(sizes: Sequence[int], most_rows: int, most_tokens: int | None) -> int:
    """Micro-batches for these rows: of at most so many rows, or, where that is given, of at most so many tokens.

    A row that has more tokens by itself is a micro-batch of its own.
    """
    if not sizes:
        return 0
    if most_tokens is None:
        return -(-len(sizes) // most_rows)
    parts = max(1, -(-sum(min(size, most_tokens) for size in sizes) // most_tokens))
    while parts < len(sizes) and not _fits(sizes, balanced(sizes, parts), most_tokens):
        parts += 1
    return parts


def _fits(sizes: Sequence[int], parts: list[list[int]], most: int) -> bool:
    return all(len(part) == 1 or sum(sizes[row] for row in part) <= most for part in parts)
