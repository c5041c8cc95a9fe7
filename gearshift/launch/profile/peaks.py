"""What this machine reaches: the rate of one large matrix product, and that of a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gearshift.engine import World
from gearshift.engine.distributed import now

# Rows and columns of the product, bytes of the copy: larger than a processor's last-level cache, or enough to fill a
# GPU; of a dozen runs, the fastest.
_SIZE = {"cpu": (1024, 128 << 20), "gpu": (8192, 1 << 30)}
_RUNS = 12


@dataclass(frozen=True)
class Peaks:
    """Of this rank, while all ranks measure at once: flops a second, and bytes read and written a second."""

    flops: float
    bytes: float
    product: str  # "1024 x 1024 fp32"
    threads: int


@torch.no_grad()
def measure(world: World, dtype: torch.dtype) -> Peaks:
    """In the run's dtype, with this rank's threads. Under two seconds on a CPU. Collective."""
    size, copied = _SIZE["cpu" if world.device.type == "cpu" else "gpu"]
    left, right = (torch.randn(size, size, device=world.device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    source = torch.ones(copied, dtype=torch.uint8, device=world.device)
    into = torch.ones_like(source)
    product = _fastest(world, lambda: torch.mm(left, right, out=out))
    copy = _fastest(world, lambda: into.copy_(source))
    name = f"{size} x {size} {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
    return Peaks(2.0 * size**3 / product, 2.0 * copied / copy, name, torch.get_num_threads())


def _fastest(world: World, run: Callable[[], object]) -> float:
    """Seconds. All ranks begin together: they share memory, and cores may slow down when all are at work."""
    run()
    world.max(0.0)
    seconds = []
    for _ in range(_RUNS):
        start = now(world.device)
        run()
        seconds.append(now(world.device) - start)
    return min(seconds)
