"""What the benchmarks under the launcher share: a random Llama whose sizes are arguments, and ways timed in turn."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig

from gearshift.engine import World


def add_sizes(parser: argparse.ArgumentParser, hidden: int, layers: int, heads: int, vocabulary: int) -> None:
    """The sizes of the model, with these defaults, its dtype, and what the launcher gives."""
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    parser.add_argument("--hidden", type=int, default=hidden)
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--heads", type=int, default=heads)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--vocabulary", type=int, default=vocabulary)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")


def config_of(options: argparse.Namespace) -> Any:
    return AutoConfig.for_model(
        "llama",
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads or options.heads,
        max_position_embeddings=4096,
    )


def in_turn(ways: dict[str, Callable[[], None]], repeats: int, world: World) -> dict[str, list[float]]:
    """Seconds of each way until every rank is done, in turn A B C A B C ..., after one warm-up of each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            dist.barrier()
            start = time.perf_counter()
            way()
            if world.device.type != "cpu":
                torch.accelerator.synchronize()
            dist.barrier()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds
