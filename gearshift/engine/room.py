"""What a generation needs and may not have: positions of the model, and memory for keys and values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from gearshift.engine.distributed import World
from gearshift.errors import UserError

# Part of the free memory that the cache may take; the rest is for the activations of a forward.
_SHARE = 0.9


def check_positions(config: Any, longest: int, world: World) -> None:
    """Raises UserError on every rank when a prompt and its answer may have more tokens than the model has positions.

    `longest`: the most of this rank's. Collective.
    """
    positions = positions_of(config)
    most = int(world.max(longest))
    if positions is not None and most > positions:
        raise UserError(
            f"rollout.max_new_tokens: a prompt and its answer may take {most:,} positions, and the model has "
            f"{positions:,}: lower it by {most - positions:,}, or leave out long prompts (data.max_prompt_tokens)"
        )


def positions_of(config: Any) -> int | None:
    """The most tokens of a sequence that a `transformers` config has positions for; None: it sets no bound."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if found is None else int(found)


def check_memory(row_bytes: int, rows: int, held: int, world: World) -> None:
    """Raises UserError on every rank when a rank has no memory for its keys and values. Collective.

    `row_bytes`: of one sequence on this rank; `rows`: sequences at once; `held`: bytes of a cache that would make room.
    To be called before any rank allocates.
    """
    usable = held + int(_SHARE * free_bytes(world))
    fitting = usable // row_bytes if rows else 0
    fewest = -world.max(-fitting if fitting < rows else -math.inf)
    if fewest < math.inf:
        fits = f"{int(fewest):,} sequences fit: set rollout.slots to that" if fewest else "not even one sequence fits"
        raise UserError(
            f"rollout.slots: the memory of a rank does not hold keys and values of {row_bytes / 2**20:,.1f} MiB for "
            f"each sequence that it is to decode at once; {fits}, lower rollout.max_new_tokens or raise rollout.tp_size"
        )


def position_bytes(config: Any, tp_size: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one position of one sequence on one rank, all layers together."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    # With fewer key/value heads than ranks, ranks repeat a head.
    return 2 * int(text.num_hidden_layers) * max(1, kv_heads // tp_size) * int(head_size) * dtype.itemsize


def free_bytes(world: World) -> int:
    """Memory that this rank could still take: of its GPU, or its part of what this host's ranks share."""
    if world.device.type == "cpu":
        return _host_free() // world.local_size
    module = torch.get_device_module(world.device)
    unused = module.memory_reserved(world.device) - module.memory_allocated(world.device)
    return int(module.mem_get_info(world.device)[0] + unused)


def _host_free() -> int:
    import psutil  # DeepSpeed's own requirement

    free = int(psutil.virtual_memory().available)
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container: it may be lower than the host's memory
    if limit.is_file() and limit.read_text().strip() != "max":
        used = int(limit.with_name("memory.current").read_text())
        statistics = limit.with_name("memory.stat").read_text().split()
        of_files = int(statistics[statistics.index("inactive_file") + 1])  # given back when asked for
        free = min(free, int(limit.read_text()) - used + of_files)
    return free
