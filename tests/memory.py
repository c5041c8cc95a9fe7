"""How much of a tensor is in memory, by what Linux says of mappings."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) .*?^Anonymous: +(\d+) kB", re.MULTILINE | re.DOTALL)


def resident_bytes(tensor: Tensor) -> int:
    """Of the mappings that have nothing but this contiguous tensor; with no such, all of it."""
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    mappings = _MAPPING.findall(Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace"))
    inside = [int(kb) * 1024 for low, high, kb in mappings if start <= int(low, 16) and int(high, 16) <= end]
    return sum(inside) if inside else tensor.nbytes
