"""`decode_attention` through the compiled library beside its own way through torch (an indexed write and SDPA).
On processors, one thread: on a GPU there is only the way through torch.

python -m benchmarks.kernels.decode_attention [--rows N ...] [--repeats N]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.kernels.command import one_thread, parse
from benchmarks.kernels.measuring import Variant, measure
from benchmarks.kernels.report import Report
from gearshift.kernels import Columns, decode_attention, native

OURS, TORCH = "gearshift", "through torch"
HEADS, KV_HEADS, SIZE, COLUMNS = 6, 3, 64, 256


@one_thread()
def main() -> None:
    options = parse(__doc__ or "", on_cpu=50)
    options.device = torch.device("cpu")
    report = Report("decode_attention", options)
    for rows in options.rows:
        once = step(rows)
        variants = [Variant(TORCH, patch.object(native, "built", lambda: None)(once)), Variant(OURS, once)]
        results = measure(variants, options.repeats, options.device, 0)
        shape = {"n": rows, "heads": HEADS, "kv_heads": KV_HEADS, "D": SIZE, "C": COLUMNS, "dtype": "float32"}
        report.add(shape, "forward", results, base=TORCH, same_as=TORCH)
    report.finish(axis="n")


def step(rows: int) -> Callable[[], Any]:
    rng = torch.Generator().manual_seed(0)
    query = torch.randn(rows, HEADS, SIZE, generator=rng)
    key, value = (torch.randn(rows, KV_HEADS, SIZE, generator=rng) for _ in range(2))
    keys, values = (torch.randn(rows, KV_HEADS, COLUMNS, SIZE, generator=rng) for _ in range(2))
    positions = torch.randint(COLUMNS // 2, COLUMNS, (rows,), generator=rng)

    @torch.no_grad()
    def once() -> Any:
        return decode_attention(query, key, value, keys, values, Columns(positions), scaling=SIZE**-0.5)

    return once


if __name__ == "__main__":
    main()
