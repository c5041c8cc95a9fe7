"""The toy world over seeds and penalties: all systems, PPO and PPO-ptx at each KL coefficient, GRPO and RLOO.

    python benchmarks/toy_grid.py RUNS --out docs/toy-grid.json      (on two CPU cores: some ten minutes a seed)

Each seed trains everything anew, from the base model on, by the demo's configs (`gearshift/launch/demo/*.yaml`): every
stage's `run.seed` is the config's plus 100 times the seed. The world, its labelers' noise
(`gearshift/rlhf/toyworld.py`) and the 500 test prompts are the same. What is varied, and what must hold, is in the
constants below; nothing is chosen by what comes out. Stages that are done are not run again. Writes the figures, a
table (.md) and a picture (.png).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from gearshift.launch.demo import OTHER_ADVANTAGES

SEEDS = (1, 2, 3)
COEFS = (0.0, 0.05, 0.2, 0.8)
DEMO_COEF = 0.2  # of the demo's configs: the systems that the gates are about
GATES = (("sft", "base"), ("ppo", "sft"), ("ppo-ptx", "sft"))  # true score of the first above the second's
STUDENT_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 0.975 quantile of Student's t, by the number of seeds


@dataclass(frozen=True)
class Stage:
    """A command of the demo, under another name and with some settings changed: (section, ..., field) -> value."""

    name: str
    command: str
    config: str
    settings: dict[tuple[str, ...], Any] = field(default_factory=dict)


def stages() -> Iterator[Stage]:
    yield Stage("pretrain", "pretrain", "pretrain")
    for name in ("sft", "flan", "t0"):
        yield Stage(name, "sft", name)
    yield Stage("reward", "reward", "reward")
    for kind in ("ppo", "ppo-ptx"):
        for coef in COEFS:
            yield Stage(run_name(kind, coef), "ppo", kind, {("ppo", "kl", "coef"): coef})
    for name, settings in OTHER_ADVANTAGES.items():
        yield Stage(name, "ppo", "ppo", {tuple(key.split(".")): value for key, value in settings.items()})


def run_name(kind: str, coef: float) -> str:
    return kind if coef == DEMO_COEF else f"{kind}-{coef:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the figures")
    options = parser.parse_args()
    for seed in options.seeds:
        one_seed(options.runs / f"seed-{seed}", seed)
    result = collected(options.runs, options.seeds)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table = markdown(result)
    options.out.with_suffix(".md").write_text(table, encoding="utf-8")
    draw(result, options.out.with_suffix(".png"))
    print(table)


# --- runs ------------------------------------------------------------------------------------------------------------


def one_seed(folder: Path, seed: int) -> None:
    from gearshift.rlhf.toytasks import write_tasks
    from gearshift.rlhf.toyworld import write_world

    if not (folder / "world").is_dir():
        write_world(folder / "world")
        write_tasks(folder / "world")
    for stage in stages():
        if not (folder / stage.name / "model").is_dir():
            run(stage, folder, seed)
    if not (folder / "compare/systems.json").is_file():
        run(Stage("compare", "compare", "compare-full", systems()), folder, seed)


def systems() -> dict[tuple[str, ...], Any]:
    """Those of the demo's comparison, and the others."""
    known = ("pretrain", "sft", "flan", "t0", "reward", "ppo", "ppo-ptx")
    return {("systems", s.name): {"init": f"runs/demo/{s.name}/model"} for s in stages() if s.name not in known}


def run(stage: Stage, folder: Path, seed: int) -> None:
    """One stage through its own command, as a person would start it; its seconds are noted."""
    config = folder / "configs" / f"{stage.name}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(config_text(stage, folder, seed), encoding="utf-8")
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "gearshift.launch", stage.command, str(config)], check=True)
    seconds = folder / "seconds.json"
    told = json.loads(seconds.read_text()) if seconds.is_file() else {}
    seconds.write_text(json.dumps(told | {stage.name: time.perf_counter() - start}, indent=1), encoding="utf-8")


def config_text(stage: Stage, folder: Path, seed: int) -> str:
    """The demo's config, with the stage's settings, this seed and this folder."""
    values = yaml.safe_load((files("gearshift.launch.demo") / f"{stage.config}.yaml").read_text(encoding="utf-8"))
    own = values["run"]["seed"] + 100 * seed
    values["run"] |= {"folder": f"runs/demo/{stage.name}", "seed": own, "overwrite": True}
    for key, value in stage.settings.items():
        *sections, name = key
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return yaml.safe_dump(values).replace("runs/demo", folder.as_posix())


# --- figures ---------------------------------------------------------------------------------------------------------


def collected(runs: Path, seeds: Sequence[int]) -> dict[str, Any]:
    each = {seed: json.loads((runs / f"seed-{seed}/compare/systems.json").read_text()) for seed in seeds}
    names = list(each[seeds[0]])
    figures = ("true_score", "score", "kl", "pretraining_loss", "length")
    found = {
        name: {figure: summary([each[seed][name][figure] for seed in seeds]) for figure in figures} for name in names
    }
    seconds = [sum(json.loads((runs / f"seed-{seed}/seconds.json").read_text()).values()) for seed in seeds]
    return {
        "command": "python " + " ".join(sys.argv),
        "seeds": list(seeds),
        "seconds": seconds,
        "systems": found,
        "gates": [gate(each, better, worse) for better, worse in GATES],
        "each": {str(seed): systems for seed, systems in each.items()},
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """The mean over seeds and the half width of its 95% interval (Student's t)."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": statistics.mean(values), "half": STUDENT_95.get(len(values), math.nan) * spread, "each": values}


def gate(each: Mapping[int, Mapping[str, Any]], better: str, worse: str) -> dict[str, Any]:
    """In every seed, by more than the intervals of both over prompts."""
    holds = [each[s][better]["true_score_low"] > each[s][worse]["true_score_high"] for s in each]
    return {"gate": f"{better} above {worse}", "holds": all(holds), "each": holds}


def markdown(result: Mapping[str, Any]) -> str:
    lines = [
        "| system | true score | seeds | reward score | KL, nats | loss on text, nats | length, tokens |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for name, found in result["systems"].items():
        cells = [f"{found[f]['mean']:.3f} ± {found[f]['half']:.3f}" for f in ("true_score", "score", "kl")]
        cells += [f"{found[f]['mean']:.3f} ± {found[f]['half']:.3f}" for f in ("pretraining_loss", "length")]
        seeds = ", ".join(f"{value:.3f}" for value in found["true_score"]["each"])
        lines.append(f"| {name} | {cells[0]} | {seeds} | " + " | ".join(cells[1:]) + " |")
    lines += ["", *(f"- {'holds' if g['holds'] else 'FAILS'}: {g['gate']}, in every seed" for g in result["gates"])]
    minutes = " + ".join(f"{seconds / 60:.0f}" for seconds in result["seconds"])
    return "\n".join([*lines, f"- {minutes} minutes for seeds {', '.join(map(str, result['seeds']))}", ""])


def draw(result: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4))
    kinds = {"ppo": ("#d55e00", "PPO"), "ppo-ptx": ("#009e73", "PPO-ptx")}
    for axes, what, title in zip(
        panels,
        ("true_score", "score", "pretraining_loss"),
        ("true score", "reward-model score", "loss on pretraining text, nats a token"),
        strict=True,
    ):
        for kind, (colour, label) in kinds.items():
            rows = [result["systems"][run_name(kind, coef)] for coef in COEFS]
            at = [row["kl"]["mean"] for row in rows]
            axes.plot(at, [row[what]["mean"] for row in rows], color=colour, marker="o", label=label)
            for row, coef, x in zip(rows, COEFS, at, strict=True):
                axes.scatter(row["kl"]["each"], row[what]["each"], color=colour, s=10, alpha=0.5)
                axes.annotate(
                    f"β {coef:g}", (x, row[what]["mean"]), textcoords="offset points", xytext=(5, 5), fontsize=8
                )
        for name, colour in (("grpo", "#0072b2"), ("rloo", "#cc79a7")):
            row = result["systems"][name]
            axes.scatter(row["kl"]["mean"], row[what]["mean"], color=colour, marker="s", label=name.upper())
        axes.axhline(result["systems"]["sft"][what]["mean"], color="#777777", linestyle="--", label="SFT")
        axes.set_xlabel("KL from SFT, nats per response")
        axes.set_xscale("symlog", linthresh=1)
        axes.set_title(title, fontsize=11)
        axes.grid(True, alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
