"""The plan of a shift on paper: bytes of every rank, buffers and the time to plan, for models of any size."""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gearshift.engine.layout import Split, TensorParallelLayout
from gearshift.engine.placement import Placement
from gearshift.engine.reshard import ReshardPlan

# Hidden, intermediate, layers, heads (of 128; 8 for keys and values). All have 128,256 tokens.
PRESETS = {
    "llama-3-8b": (4096, 14336, 32, 32),
    "llama-3-70b": (8192, 28672, 80, 64),
    "llama-3-405b": (16384, 53248, 126, 128),
}


def on_paper(options: argparse.Namespace) -> None:
    """Print the plan that `options` name; no process group, no weights."""
    size, tp = {"fp32": 4, "bf16": 2}[options.dtype], options.tp or 8
    shapes, splits = shapes_and_splits(config_of(options.plan), tp)
    start = time.perf_counter()
    plan = ReshardPlan.build(
        shapes, splits, Placement(options.ranks, tp, options.per_host), (options.bucket_mb << 20) // size
    )
    traffic = plan.traffic()
    seconds = time.perf_counter() - start
    parameters = sum(map(math.prod, shapes.values()))
    rows = {
        "slices": traffic.needed,
        "received": traffic.received,
        "received within the host": traffic.received - traffic.received_between_hosts,
        "received from other hosts": traffic.received_between_hosts,
        "sent": traffic.sent,
        "sent within the host": traffic.sent - traffic.sent_between_hosts,
        "sent to other hosts": traffic.sent_between_hosts,
        "buffers of the shift": np.array([plan.peak(rank) for rank in range(options.ranks)]),
        "received if all were gathered": np.full(options.ranks, parameters * (options.ranks - 1) // options.ranks),
    }
    print(f"{options.plan}: {parameters / 1e9:.1f} B parameters in {options.dtype} on {options.ranks} ranks, "
          f"{options.per_host} a host, tensor parallel {tp}")  # fmt: skip
    print(f"{'GB of a rank':<32}{'least':>9}{'mean':>9}{'most':>9}")
    for name, counts in rows.items():
        print(f"{name:<32}{''.join(f'{v * size / 1e9:9.3f}' for v in (counts.min(), counts.mean(), counts.max()))}")
    print(f"{len(plan.buckets)} exchanges of at most {options.bucket_mb} MiB a rank; planned in {seconds * 1e3:.1f} ms")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(as_json(options, parameters, size, rows, seconds), indent=1) + "\n")


def as_json(
    options: argparse.Namespace, parameters: int, size: int, rows: dict[str, NDArray[np.int64]], seconds: float
) -> dict[str, Any]:
    return {
        "model": options.plan,
        "parameters": parameters,
        "options": {k: str(v) for k, v in vars(options).items() if k not in ("local_rank", "out")},
        "bytes": {name: (counts * size).tolist() for name, counts in rows.items()},
        "seconds": seconds,
    }


def shapes_and_splits(config: Any, tp: int) -> tuple[dict[str, tuple[int, ...]], dict[str, Split]]:
    """As a rollout replica has them, from the model of a `transformers` config on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    from gearshift.engine.loading import build_on_meta

    built = build_on_meta(AutoModelForCausalLM, config, torch.bfloat16)
    splits = TensorParallelLayout.of(built, tp).splits
    return {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}, splits


def config_of(model: str) -> Any:
    from transformers import AutoConfig

    if model not in PRESETS:
        return AutoConfig.from_pretrained(model)
    hidden, intermediate, layers, heads = PRESETS[model]
    return AutoConfig.for_model(
        "llama",
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
    )
