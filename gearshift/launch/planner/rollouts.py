"""The rollout gear on paper: slices, the shift's buffers and bytes, keys and values, activations of prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gearshift.engine.adapters import is_adapter, plain_name
from gearshift.engine.generator import PREFILL_TOKENS
from gearshift.engine.hybrid import KEPT_CACHE_BYTES
from gearshift.engine.placement import Placement
from gearshift.engine.replica import Replica
from gearshift.engine.reshard import ReshardPlan, Traffic
from gearshift.engine.room import position_bytes
from gearshift.launch.planner.models import PaperModel
from gearshift.launch.planner.passes import Sharding
from gearshift.launch.planner.tracing import META, trace


class PaperGroup:
    """Stands for the ranks of a tensor-parallel group: shapes go through, nothing else."""

    neighbours, group, rank = None, None, 0

    def __init__(self, size: int):
        self.size = size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous()


@dataclass(frozen=True)
class Rollouts:
    """`rows` answered by a tensor-parallel group in an iteration, `slots` of them at once."""

    rows: int
    slots: int
    prompt: int
    response: int


class PaperReplica:
    """One rank's part of the rollout model (of part 0, which is as large as any)."""

    def __init__(self, config: Any, tp_size: int, dtype: torch.dtype):
        self.config, self.tp_size, self.dtype = config, tp_size, dtype
        group: Any = PaperGroup(tp_size)
        self._replica = Replica(config, group, dtype, META)
        self._prefills: dict[tuple[int, int], int] = {}

    @property
    def weights(self) -> int:
        """Bytes of the slices."""
        return sum(t.nbytes for t in self._replica.slices.values())

    def cache(self, slots: int, positions: int, block: int) -> int:
        """Bytes of keys and values."""
        return slots * -(-positions // block) * block * position_bytes(self.config, self.tp_size, self.dtype)

    def prefill(self, rollouts: Rollouts) -> int:
        """Bytes of activations of the largest forward over prompts."""
        rows = min(rollouts.slots, max(1, PREFILL_TOKENS // rollouts.prompt))
        key = rows, rollouts.prompt
        if key not in self._prefills:
            tokens = torch.zeros(*key, dtype=torch.int64, device=META)
            self._replica.cache.begin_scoring()
            found = trace(self._replica.model, lambda: self._replica.hidden(tokens, tokens), train=False)
            self._prefills[key] = found.activations
        return self._prefills[key]

    def draw(self, slots: int, truncated: bool) -> int:
        """Bytes of logits in fp32, and of what drawing a token for every slot makes of them; `truncated`: by top-k or
        top-p, for which they are sorted as well."""
        copies = 5 if truncated else 3
        return copies * slots * self._replica.head.weight.shape[0] * 4

    def plan(self, ranks: int, per_host: int, bucket_bytes: int, persistence: int) -> ReshardPlan:
        """The shift on so many ranks."""
        shapes = self._replica.shapes
        held = {name for name, shape in shapes.items() if math.prod(shape) <= persistence}
        bucket = max(1, bucket_bytes // self.dtype.itemsize)
        placement = Placement(ranks, self.tp_size, per_host)
        return ReshardPlan.build(shapes, self._replica.layout.splits, placement, bucket, held)


def answer_bytes(rows: int, response: int) -> int:
    """Tokens, log-probs and uniforms of the answers of a group."""
    return rows * response * (8 + 4 + 4)


def merged_bytes(model: PaperModel, sharding: Sharding) -> int:
    """Bytes on a rank of copies of the weights that have adapters, with these added, which a shift reads."""
    adapted = {
        plain_name(name).rpartition(".lora_")[0] for name, _ in model.module.named_parameters() if is_adapter(name)
    }
    return sum(
        sharding.shard(p.numel()) * p.element_size()
        for name, p in model.module.named_parameters()
        if plain_name(name).removesuffix(".weight") in adapted
    )


def shift_seconds(traffic: Traffic, itemsize: int, within: float, between: float) -> float:
    """Of the slowest rank, at so many bytes a second within a host and between hosts; both ways at once."""
    inside = np.maximum(traffic.received - traffic.received_between_hosts, traffic.sent - traffic.sent_between_hosts)
    outside = np.maximum(traffic.received_between_hosts, traffic.sent_between_hosts)
    return float((inside * itemsize / within + outside * itemsize / between).max())


def cache_is_kept(held: int, keep_weights: bool, records: bool) -> bool:
    """Whether keys and values stay between rollouts (see `HybridEngine`)."""
    return keep_weights and records and held <= KEPT_CACHE_BYTES
