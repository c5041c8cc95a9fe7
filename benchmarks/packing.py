"""A forward and backward pass over rows of unequal length: padded, and packed without padding, in one run.

    deepspeed --num_accelerators 1 benchmarks/packing.py            (on GPUs: --num_gpus N)

A random Llama under ZeRO-3, `--rows` sequences a rank of `--shortest` to `--longest` tokens, uniformly drawn; the loss
is of the next tokens' log-probs and of the entropy. In turn, `--repeats` times; medians, and the ratio pair by pair:
  padded     every row as wide as the batch's longest, micro-batches of `--micro` rows as they come
  by length  rows of like length in one micro-batch, which is as wide as its longest: what families get that cannot pack
  packed     sequences one after another, in micro-batches of at most as many tokens as the padded ones have
The losses of all ways must agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The repository in place of this folder, whose `kernels` would hide Hugging Face's package of that name.
if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks.kernels.command import DTYPES, device_name, versions
from benchmarks.llama import add_sizes, config_of, in_turn
from gearshift.engine import CausalModel, TokenBatch, Training, init_distributed
from gearshift.kernels import Loss

GOAL = 1.5  # times faster than padded
WAYS = ("padded", "by length", "packed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, hidden=384, layers=6, heads=6, vocabulary=8192)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--shortest", type=int, default=16)
    parser.add_argument("--longest", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    world = init_distributed()
    torch.manual_seed(0)
    model = CausalModel.load(
        "config",
        world,
        dtype=DTYPES[options.dtype],
        micro_batch_size=options.micro,
        training=Training(learning_rate=0.0, optimizer="sgd"),
        config=config_of(options),
    )
    batch = draw(options, world.rank)
    if not model.packs:
        raise SystemExit("this model does not pack")
    losses: dict[str, float] = {}
    seconds = in_turn(
        {way: way_of(way, model, batch, losses, options.micro * options.longest) for way in WAYS},
        options.repeats,
        world,
    )
    if world.is_main:
        tell(options, model, batch, seconds, losses)


def draw(options: argparse.Namespace, rank: int) -> TokenBatch:
    rng = torch.Generator().manual_seed(rank)
    lengths = torch.randint(options.shortest, options.longest + 1, (options.rows, 1), generator=rng)
    lengths[0] = options.longest
    tokens = torch.randint(0, options.vocabulary, (options.rows, options.longest), generator=rng)
    return TokenBatch(tokens, torch.where(torch.arange(options.longest) < lengths, tokens.roll(-1, 1), -100))


def way_of(
    way: str, model: CausalModel, batch: TokenBatch, losses: dict[str, float], most_tokens: int
) -> Callable[[], Any]:
    def loss(of: CausalModel, micro: TokenBatch, count: Tensor) -> Loss:
        lengths = micro.sizes
        width = micro.tokens.shape[1] if way == "padded" else int(lengths.max())
        given = lengths if way == "packed" else None
        logprobs, entropy = of.forward(micro.tokens[:, :width], micro.targets[:, :width], entropy=True, lengths=given)
        assert entropy is not None
        return Loss(-(logprobs.sum() + 0.01 * entropy.sum()) / count, {})

    class AsTheyCome(TokenBatch):
        """Rows that all seem to be as long, and stay in their order."""

        @property
        def sizes(self) -> Tensor:
            return torch.full((len(self.tokens),), self.tokens.shape[1])

    given = AsTheyCome(batch.tokens, batch.targets) if way == "padded" else batch

    def run() -> None:
        model.__dict__["_keeps_apart"] = way == "packed"
        model.micro_batch_tokens = most_tokens if way == "packed" else None
        losses[way] = float(model.accumulate(loss, given)["loss"])

    return run


def tell(
    options: argparse.Namespace, model: CausalModel, batch: TokenBatch, seconds: dict[str, list[float]],
    losses: dict[str, float],
) -> None:  # fmt: skip
    tokens = int(batch.sizes.sum())
    print(f"{model.parameters_total / 1e6:.1f} M parameters, {model.world.size} ranks of {len(batch)} sequences of "
          f"{options.shortest} to {options.longest} tokens ({tokens} on rank 0, {batch.tokens.numel()} padded); "
          f"{device_name(model.world.device)}, {torch.get_num_threads()} threads a rank")  # fmt: skip
    ratios = {}
    for way, own in seconds.items():
        ratios[way] = statistics.median(p / o for p, o in zip(seconds["padded"], own, strict=True))
        print(f"{way:<10}{statistics.median(own) * 1e3:9.1f} ms   (min {min(own) * 1e3:.1f}, max {max(own) * 1e3:.1f})"
              f"{ratios[way]:7.2f} times as fast as padded   loss {losses[way]:.6f}")  # fmt: skip
    apart = max(abs(loss - losses["padded"]) for loss in losses.values()) / abs(losses["padded"])
    print(f"{'holds ' if ratios['packed'] >= GOAL else 'MISSED'}  packed at least {GOAL} times as fast: "
          f"{ratios['packed']:.2f}")  # fmt: skip
    print(f"{'holds ' if apart <= 1e-5 else 'MISSED'}  equal losses (1e-5): {apart:.1e}")
    if options.out:
        found = {"seconds": seconds, "losses": losses, "ratios": ratios, "tokens": tokens, "versions": versions()}
        found |= {"options": {k: str(v) for k, v in vars(options).items() if k not in ("local_rank", "out")}}
        found["device"] = device_name(model.world.device)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
