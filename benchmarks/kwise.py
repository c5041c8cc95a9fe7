"""A prompt's K ranked answers as one row, each encoded once, against a row of its own for each of their pairs.

    deepspeed --num_accelerators 2 benchmarks/kwise.py            (on GPUs: --num_gpus N)

Forward and backward of the reward loss (no optimizer step) over the same `--prompts` random prompts with K answers
each, all of different rank. K-wise encodes K sequences a prompt and pairwise K(K-1): times should differ by K-1.
Micro-batches hold as many tokens either way. Both losses are the mean over the same pairs: they are checked to agree.
In turn, `--repeats` times after one warm-up; medians, and the ratio pair by pair.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The repository in place of this folder, whose `kernels` would hide Hugging Face's package of that name.
if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.kernels.command import DTYPES
from benchmarks.llama import add_sizes, config_of, in_turn
from gearshift.engine import RewardModel, Training, World, init_distributed
from gearshift.rlhf.data.batches import collate_comparisons
from gearshift.rlhf.data.encoding import Comparison, split_in_pairs
from gearshift.rlhf.reward import reward_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, hidden=256, layers=4, heads=4, vocabulary=2048)
    parser.add_argument("--answers", type=int, nargs="+", default=[4, 9], help="K")
    parser.add_argument("--prompts", type=int, default=8, help="over all ranks")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    world = init_distributed()
    model = build(options, world)
    found = [measure(options, world, model, answers) for answers in options.answers]
    if world.is_main:
        report(options, world, model, found)


def build(options: argparse.Namespace, world: World) -> RewardModel:
    """A reward model with a new head on a random backbone; the micro-batch size is set for each way."""
    with tempfile.TemporaryDirectory() as folder:
        if world.is_main:
            from transformers import AutoModelForCausalLM

            AutoModelForCausalLM.from_config(config_of(options)).save_pretrained(folder)
        folders = [folder]
        if world.size > 1:
            torch.distributed.broadcast_object_list(folders, 0)
        model = RewardModel.load(
            folders[0],
            world,
            dtype=DTYPES[options.dtype],
            micro_batch_size=1,
            training=Training(learning_rate=0.0, optimizer="sgd"),
            new_head=True,
        )
        world.sum(torch.zeros(1, device=world.device))  # the folder stays until every rank has read its config
        return model


def measure(options: argparse.Namespace, world: World, model: RewardModel, answers: int) -> dict[str, Any]:
    """Seconds of both ways, and both losses, at K `answers`."""
    rows = make_rows(options, answers)
    mine = rows[world.share(len(rows))]
    batches = {
        "kwise": (collate_comparisons(mine), 1),
        "pairwise": (collate_comparisons([pair for row in mine for pair in split_in_pairs(row)]), max(1, answers // 2)),
    }
    losses: dict[str, float] = {}

    def way(name: str) -> Callable[[], None]:
        batch, size = batches[name]

        def run() -> None:
            model.micro_batch_size = size
            losses[name] = float(model.accumulate(reward_loss, batch)["loss"])
            model.step()  # rate 0: the gradients are dropped

        return run

    seconds = in_turn({name: way(name) for name in batches}, options.repeats, world)
    ratios = [pair / once for pair, once in zip(seconds["pairwise"], seconds["kwise"], strict=True)]
    return {
        "answers": answers,
        "sequences": {"kwise": answers, "pairwise": answers * (answers - 1)},
        "seconds": seconds,
        "losses": losses,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def make_rows(options: argparse.Namespace, answers: int) -> list[Comparison]:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return [int(t) for t in torch.randint(3, options.vocabulary, (count,), generator=generator)]

    return [
        Comparison(
            tokens(options.prompt_tokens),
            [tokens(options.answer_tokens) for _ in range(answers)],
            [float(rank) for rank in range(answers)],
        )
        for _ in range(options.prompts)
    ]


def report(options: argparse.Namespace, world: World, model: RewardModel, found: list[dict[str, Any]]) -> None:
    cpu = world.device.type == "cpu"
    result: dict[str, Any] = {
        "device": platform.processor() or platform.machine() if cpu else torch.cuda.get_device_name(),
        "ranks": world.size,
        "parameters": model.parameters_total,
        "options": {k: str(v) for k, v in vars(options).items() if k != "local_rank"},
        "answers": found,
    }
    print(json.dumps(result))
    for each in found:
        loss, other = each["losses"]["kwise"], each["losses"]["pairwise"]
        agree = "the same loss" if abs(loss - other) <= 1e-3 * abs(loss) else f"DIFFERS: losses {loss} and {other}"
        print(
            f"K = {each['answers']}: pairwise takes {each['ratio']:.2f} times as long ({min(each['ratios']):.2f} to "
            f"{max(each['ratios']):.2f}), for {each['answers'] - 1} times the sequences; {agree}; medians of "
            f"{options.repeats} pairs, {options.prompts} prompts, {world.size} ranks"
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
