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


def resident_bytes_of_file(path: Path) -> int:
    """Of all mappings of it."""
    lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    found, inside = 0, False
    for line in lines:
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(f" {path}")
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found
