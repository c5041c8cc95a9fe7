"""A demo's folder as a report reads it, with every number a function of a seed."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = ("add", "copy", "reverse", "sort")
RIGHT = {"base": 0.05, "sft": 0.46, "ppo": 0.78, "ppo-ptx": 0.74}


def jsonl(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_demo(folder: Path, iterations: int = 8, prompts: int = 8) -> Path:
    """A demo folder with curves of about the real shape; every number is a function of the seed 0."""
    rng = random.Random(0)
    for stage, start, end in (("pretrain", 5.5, 1.9), ("sft", 2.4, 0.6), ("reward", 0.72, 0.44)):
        lines: list[dict[str, Any]] = []
        for step in range(1, iterations + 1):
            loss = end + (start - end) * math.exp(-4 * step / iterations)
            lines.append({"step": step, "loss/train": loss + rng.gauss(0, 0.03), "timing/step": 0.2})
            if step % max(1, iterations // 6) == 0:
                lines.append({"step": step, "loss/validation": loss + 0.05})
                if stage == "reward":
                    lines[-1]["reward/accuracy"] = 0.85 - 0.35 * math.exp(-3 * step / iterations)
        jsonl(folder / stage / "metrics.jsonl", lines)
        (folder / stage / "config.yaml").write_text(f"run:\n  folder: {stage}\ntrain:\n  batch_size: 32\n")
    for name, drift in (("ppo", 0.55), ("ppo-ptx", 0.12)):
        jsonl(folder / name / "metrics.jsonl", [ppo_line(i, iterations, drift, rng) for i in range(1, iterations + 1)])
        (folder / name / "config.yaml").write_text(f"run:\n  folder: {name}\nppo:\n  batch_size: 64\n")
        samples = [{"step": i, "prompt": f"sort {i} 2", "response": "2 3", "score": 0.5, "kl": 1.5, "finished": i > 1}
                   for i in range(1, iterations + 1) for _ in range(3)]  # fmt: skip
        jsonl(folder / name / "samples.jsonl", samples)
    write_compare(folder / "compare", prompts, rng)
    checks = [
        {"name": "SFT's true score is above the base model's", "passed": True, "detail": "0.460 > 0.050 + 0.04"},
        {"name": "PPO's true score is above SFT's", "passed": True, "detail": "0.780 > 0.460 + 0.044"},
        {"name": "mean KL per response stays under its bound", "passed": False, "detail": "31.2 > 30 nats"},
    ]
    (folder / "checks.json").write_text(json.dumps(checks))
    seconds = {
        "world": 3.2,
        "pretrain": 64.0,
        "sft": 41.0,
        "reward": 38.5,
        "ppo": 122.4,
        "ppo-ptx": 141.9,
        "compare": 20,
    }
    (folder / "timings.json").write_text(json.dumps(seconds))
    (folder / "world").mkdir()
    about = {"kinds": list(KINDS), "labeler_error_rate": 0.1, "test_prompts": prompts, "ranks": 2}
    (folder / "world" / "about.json").write_text(json.dumps(about))
    return folder


def ppo_line(i: int, iterations: int, drift: float, rng: random.Random) -> dict[str, Any]:
    done = 1 - math.exp(-3 * i / iterations)
    line = {
        "step": i,
        "objective/episodes": 64 * i,
        "objective/scores": -0.4 + 2.1 * done + rng.gauss(0, 0.12),
        "objective/kl": 9 * done + abs(rng.gauss(0, 0.3)),
        "objective/entropy": 20 - 8 * done,
        "policy/approxkl_avg": 0.01 + abs(rng.gauss(0, 0.002)),
        "policy/clipfrac_avg": 0.08 + rng.gauss(0, 0.01),
        "policy/entropy_avg": 2.0 - 0.8 * done,
        "critic/clipfrac_avg": 0.05 + rng.gauss(0, 0.01),
        "rollout/length": 14 - 5 * done,
        "rollout/finished": 0.9 + 0.1 * done,
        "loss/policy_avg": rng.gauss(-0.01, 0.01),
        "loss/value_avg": 0.4 * (1 - 0.8 * done),
        "val/ratio": 1 + rng.gauss(0, 0.002),
        "critic/explained_variance": 0.1 + 0.7 * done + rng.gauss(0, 0.04),
        "rollout/logprob_gap": 4e-7,
        "timing/generation": 0.55 + rng.gauss(0, 0.03),
        "timing/shift": 0.06,
        "timing/score": 0.17 + rng.gauss(0, 0.01),
        "timing/train": 0.5 + rng.gauss(0, 0.03),
        "timing/step": 1.4,
    }
    if i == 1 or i % max(1, iterations // 8) == 0:
        line["loss/pretraining_heldout"] = 1.98 + drift * done
    return line


def write_compare(folder: Path, prompts: int, rng: random.Random) -> None:
    answers: list[dict[str, Any]] = []
    systems = {}
    for name, right in RIGHT.items():
        for i in range(prompts):
            hit = rng.random() < right
            digits = [rng.randrange(10) for _ in range(5)]
            want = " ".join(map(str, sorted(digits)))
            answer = {
                "system": name,
                "id": i,
                "prompt": f"Instruction: {KINDS[i % 4]} {' '.join(map(str, digits))}\nAnswer:",
            }
            answer |= {
                "response": want if hit else "I do not <script>alert('know')</script>",
                "score": rng.gauss(right, 1),
            }
            answer |= {"kl": 4.0, "length": 9, "finished": hit, "true_score": float(hit), "kind": KINDS[i % 4]}
            answers.append(answer)
        score, win = 3 * right - 1.234, 0.5 if name == "sft" else 0.2 + right / 2
        spread = 0.0 if name == "sft" else 0.03
        systems[name] = {"true_score": right, "true_score_low": right - 0.044, "true_score_high": right + 0.044}
        systems[name] |= {"score": score, "score_low": score - 0.1, "score_high": score + 0.1, "length": 9.5}
        systems[name] |= {"kl": -2e-8 if name == "sft" else 8.7531, "pretraining_loss": 1.9 + right / 4}
        systems[name] |= {"win_rate": win, "win_rate_low": win - spread, "win_rate_high": win + spread}
        systems[name] |= {"eos_rate": 1.0, "distinct_1": 0.25, "distinct_2": 0.125, "against": "sft"}
    systems["base"]["prefixes"] = [
        {"prefix": "Q: <b>1</b>\n", "score": 0.25, "score_low": 0.125, "score_high": 0.5, "chosen": True}
    ]
    jsonl(folder / "answers.jsonl", answers)
    (folder / "systems.json").write_text(json.dumps(systems))


def edit_metrics(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        change(line)
    jsonl(path, lines)
