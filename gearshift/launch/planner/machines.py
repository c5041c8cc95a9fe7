"""What a plan is made for: memory and links of a GPU."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from gearshift.errors import UserError

GB = 1e9  # as vendors count


@dataclass(frozen=True)
class Gpu:
    """Memory, and the peak rate in one direction to GPUs of its host and of others, in GB and GB/s."""

    memory: float
    within: float
    between: float


# Vendors' data sheets: NVLink or PCIe within a host; between hosts, one network card for each GPU as is usual for it.
GPUS = {
    "b200-180g": Gpu(180, 900, 50),
    "h200-141g": Gpu(141, 450, 50),
    "h100-80g": Gpu(80, 450, 50),
    "a100-80g": Gpu(80, 300, 25),
    "a100-40g": Gpu(40, 300, 25),
    "l40s-48g": Gpu(48, 32, 12.5),
    "a10g-24g": Gpu(24, 32, 3),
    "l4-24g": Gpu(24, 32, 3),
    "rtx4090-24g": Gpu(24, 32, 3),
}
# GB of each GPU that no tensor has: CUDA's context, NCCL's buffers, cuBLAS's workspaces, holes between tensors.
RESERVED = 4.0


def gpu_of(name: str) -> Gpu:
    """Raises UserError naming the GPUs that are known."""
    if name not in GPUS:
        close = difflib.get_close_matches(name.lower(), GPUS, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"--gpu: {name} is unknown; {meant}Known: {', '.join(GPUS)}; another one by --memory-gb, --within-gbs and "
            "--between-gbs"
        )
    return GPUS[name]
