"""Seconds of one PPO iteration on 8 to 1,024 GPUs, on paper: from shapes, the plan of the shift and stated rates.

    python benchmarks/scale.py                                    the table, and every assumption
    python benchmarks/scale.py --gpu h100-80g --layer 0 --overlap 1
    python benchmarks/scale.py --out scale.json --plot scale.png

Nothing here has been measured on a GPU: rates are vendors' peaks times shares that are guesses, each an argument.
`scale_model.py` has the arithmetic, `scale_published.py` what others have published.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

# The repository in place of this folder, whose `kernels` would hide Hugging Face's package of that name.
if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.scale_model import BF16, Models, Prediction, Rates, Shape, best
from benchmarks.scale_published import LEFT_OUT, PUBLISHED, SETTINGS, SHAPES, Published, Setting
from benchmarks.shift_plan import shapes_and_splits
from gearshift.engine.layout import Split
from gearshift.engine.placement import Placement
from gearshift.engine.reshard import ReshardPlan
from gearshift.launch.planner.machines import GPUS, Gpu

MODELS = ("llama-3-8b", "llama-3-70b")
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
PARTS = ("generation", "shift", "scoring", "training")
# Peak TFLOP/s in bf16 without sparsity, and GB/s of memory: vendors' data sheets.
PEAKS = {"a100-80g": (312, 2039), "a800-80g": (312, 2039), "h100-80g": (989, 3350), "h200-141g": (989, 4800)}
LINKS = {**GPUS, "a800-80g": Gpu(80, 200, 25)}


def main() -> None:
    options = parse()
    found = {
        name: {
            model: [prediction_of(model, setting, options, ranks) for ranks in options.gpus] for model in options.models
        }
        for name, setting in SETTINGS.items()
    }
    beside = [(one, prediction_of(one.model, SETTINGS[one.setting], options, one.gpus)) for one in PUBLISHED]
    print("\n".join(as_text(found, beside, options)))
    if options.out:
        options.out.write_text(json.dumps(as_json(found, beside, options), indent=1) + "\n", encoding="utf-8")
    if options.plot:
        from benchmarks.scale_plot import draw

        draw(found, beside, options.gpus, options.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=sorted(SHAPES))
    parser.add_argument("--gpus", nargs="+", type=int, default=COUNTS, help="how many, powers of two")
    parser.add_argument("--gpu", choices=sorted(PEAKS), help="in place of the one that each setting had")
    for field in fields(Rates):
        text = "whole number" if field.type == "int" else "number"
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int if field.type == "int" else float, help=text)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--plot", type=Path, help="and draw them to this PNG file")
    return parser.parse_args()


def rates_of(setting: Setting, options: argparse.Namespace) -> Rates:
    """Of the setting's GPU and network, or of another GPU with the network that is usual for it; with what the command
    line sets."""
    gpu = options.gpu or setting.gpu
    (tflops, memory_gbs), link = PEAKS[gpu], LINKS[gpu]
    between = link.between if options.gpu or setting.between_gbs is None else setting.between_gbs
    given = {f.name: getattr(options, f.name) for f in fields(Rates) if getattr(options, f.name) is not None}
    return replace(Rates(tflops, memory_gbs, link.memory, link.within, between), **given)


def prediction_of(model: str, setting: Setting, options: argparse.Namespace, ranks: int) -> Prediction | None:
    shape, rates = SHAPES[model], rates_of(setting, options)
    other = SHAPES[setting.small] if setting.small else shape
    return best(Models(shape, other, other), setting.work, rates, ranks, shift_of(shape, rates))


def shift_of(shape: Shape, rates: Rates) -> Callable[[int, int], float]:
    """Seconds of a shift by its plan, at peak link speeds."""
    from gearshift.launch.planner.rollouts import shift_seconds

    def seconds(ranks: int, tp_size: int) -> float:
        shapes, splits = shapes_of(shape, tp_size)
        traffic = ReshardPlan.build(shapes, splits, Placement(ranks, tp_size, rates.per_host)).traffic()
        return shift_seconds(traffic, BF16, rates.within_gbs * 1e9, rates.between_gbs * 1e9)

    return seconds


@cache
def shapes_of(shape: Shape, tp_size: int) -> tuple[dict[str, tuple[int, ...]], dict[str, Split]]:
    """As a rollout replica of the model has them."""
    from transformers import AutoConfig

    same = {
        "hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "vocab_size": shape.vocabulary, "tie_word_embeddings": shape.tied,
    }  # fmt: skip
    if shape.gated:
        more = {"intermediate_size": shape.wide, "num_key_value_heads": shape.kv_heads}
        return shapes_and_splits(AutoConfig.for_model("llama", **same, **more), tp_size)
    more = {"ffn_dim": shape.wide, "word_embed_proj_dim": shape.hidden}
    return shapes_and_splits(AutoConfig.for_model("opt", **same, **more), tp_size)


Found = dict[str, dict[str, list[Prediction | None]]]
Beside = list[tuple[Published, Prediction | None]]


def as_text(found: Found, beside: Beside, options: argparse.Namespace) -> list[str]:
    lines = ["Seconds of one PPO iteration on paper. NOTHING OF THIS HAS BEEN MEASURED ON A GPU.", ""]
    for name, models in found.items():
        setting = SETTINGS[name]
        lines += [f"{setting.title}'s setting, on {options.gpu or setting.gpu}: {setting.source}"]
        for model, rows in models.items():
            lines += ["", *table(model, setting, rows, options.gpus)]
        lines.append("")
    lines += ["What others have published, beside Gearshift on paper on as many GPUs, in seconds:", ""]
    head = f"  {'system':<24}{'model':<13}{'GPUs':>5}{'published':>11}{'on paper':>10}  "
    lines.append(head + "published / on paper of " + ", ".join(PARTS))
    lines += [_published(one, paper) for one, paper in beside]
    lines += [*(f"  left out: {text}" for text in LEFT_OUT), "", *assumptions(options)]
    return lines


def _published(one: Published, paper: Prediction | None) -> str:
    told = f"{paper.seconds:.1f}" if paper else "no room"
    line = f"  {one.system:<24}{one.model:<13}{one.gpus:>5}{one.seconds:>11.1f}{told:>10}"
    if one.parts and paper:
        line += "  " + ", ".join(f"{one.parts[part]:.1f} / {paper.part(part):.1f}" for part in PARTS)
    return line


def table(model: str, setting: Setting, rows: Iterable[Prediction | None], counts: Iterable[int]) -> list[str]:
    names = ("prefill", "decode", "shift", "scoring", "policy", "critic")
    lines = [
        f"  {model:<12}" + "".join(f"{name:>9}" for name in names) + f"{'total':>9}{'tokens/s/GPU':>14}"
        "   TP, slots, rows, updates; most of decoding, training: of what"
    ]  # fmt: skip
    for ranks, row in zip(counts, rows, strict=True):
        if row is None:
            lines.append(f"  {ranks:>5} GPUs   no room for the optimizer's state on the GPUs")
            continue
        terms = {(term.part, term.name): term for term in row.terms}
        decode, policy = terms["generation", "decode"], terms["training", "policy"]
        seconds = [
            terms["generation", "prefill"].seconds, decode.seconds, row.part("shift"), row.part("scoring"),
            policy.seconds, terms["training", "critic"].seconds, row.seconds,
        ]  # fmt: skip
        rate = setting.work.episodes * setting.work.length / row.seconds / ranks
        lines.append(
            f"  {ranks:>5} GPUs  " + "".join(f"{value:>9.2f}" for value in seconds) + f"{rate:>14,.0f}"
            f"   {row.tp_size}, {row.slots}{'*' if row.aside else ''}, {row.micro_rows}, {row.updates}; "
            f"{decode.limit}, {policy.limit}"
        )  # fmt: skip
    return lines


def assumptions(options: argparse.Namespace) -> list[str]:
    lines = ["Assumptions (every figure is an argument, --name):"]
    for field in fields(Rates):
        values = {name: getattr(rates_of(setting, options), field.name) for name, setting in SETTINGS.items()}
        same = len(set(values.values())) == 1
        each = [f"{value:g} ({name})" for name, value in values.items()]
        told = f"{values['hybridflow']:g}" if same else ", ".join(each)
        lines.append(f"  {field.name:<16}{told}")
    return [
        *lines,
        "  All answers are as long as they may be. Each micro-batch gathers the weights anew, twice in training, and",
        "  reduces its gradients in fp32; layers run again in the backward pass. Weights are bf16, Adam's state and",
        "  the policy's average fp32, on the GPU (*: aside in host memory during rollouts). A minibatch has a row on",
        "  every rank at least: fewer updates on many GPUs. Between hosts, a collective uses all their network cards.",
    ]


def as_json(found: Found, beside: Beside, options: argparse.Namespace) -> dict[str, Any]:
    def told(row: Prediction | None) -> Any:
        return None if row is None else {**asdict(row), "seconds": row.seconds}

    return {
        "measured_on_a_gpu": False,
        "gpus": list(options.gpus),
        "assumptions": {name: asdict(rates_of(setting, options)) for name, setting in SETTINGS.items()},
        "settings": {name: asdict(setting) for name, setting in SETTINGS.items()},
        "predicted": {
            name: {m: [told(r) for r in rows] for m, rows in models.items()} for name, models in found.items()
        },
        "published": [{**asdict(one), "on_paper": told(paper)} for one, paper in beside],
        "left_out": LEFT_OUT,
    }


if __name__ == "__main__":
    main()
