"""The GPUs of this host."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from gearshift.errors import UserError


def visible_gpus() -> list[int]:
    """Indices of the GPUs that this process may use, without importing torch (which takes seconds)."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    found = _gpu_ids()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not found:
        return list(range(len(found)))
    devices = []
    for word in filter(None, (w.strip() for w in chosen.split(","))):
        matches = [int(word)] if word.isdigit() else [n for n, uuid in enumerate(found) if uuid.startswith(word)]
        if len(matches) != 1 or matches[0] >= len(found):
            raise UserError(
                f"CUDA_VISIBLE_DEVICES: {word} is not one of the {len(found)} GPUs: use 0 to {len(found) - 1}"
            )
        devices += matches
    return devices


def _gpu_ids() -> list[str]:
    """The UUID of each GPU, by nvidia-smi; by the device files where that is missing (the UUIDs are then empty)."""
    if shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        if listing.returncode == 0:
            return re.findall(r"^GPU \d+:.*\(UUID: ([^)]+)\)", listing.stdout, re.MULTILINE)
    return ["" for _ in Path("/dev").glob("nvidia[0-9]*")]
