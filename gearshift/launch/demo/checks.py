"""What a demo must have shown; every figure is read from its run folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

# Nats per response against the SFT model. Answering right instead of at random among the labelers' manners takes less
# than one; a policy that has found what the reward model overrates (one letter for every question) is at five.
KL_BOUND = 2.0
LOGPROB_GAP_BOUND = 1e-5  # fp32, rollout against training forward


def check(folder: Path) -> list[dict[str, Any]]:
    """`{"name", "passed", "detail"}` for each claim."""
    systems = json.loads((folder / "compare" / "systems.json").read_text(encoding="utf-8"))
    checks = [_all_answered(folder)]
    checks += [_above(systems, "sft", "base"), _above(systems, "ppo", "sft"), _above(systems, "ppo-ptx", "sft")]
    for name in ("ppo", "ppo-ptx"):
        checks.append(_bounded(f"{name}: mean KL per response, nats", systems[name]["kl"], KL_BOUND))
        metrics = _rows(folder / name / "metrics.jsonl")
        gaps = [row["rollout/logprob_gap"] for row in metrics if "rollout/logprob_gap" in row]
        checks.append(_bounded(f"{name}: largest gap of rollout and training log-probs, nats", max(gaps), _gap(folder)))
    return checks


def _all_answered(folder: Path) -> dict[str, Any]:
    """Every system answered every test prompt: none was left out on the way."""
    asked = len((folder / "world" / "prompts_test.jsonl").read_text(encoding="utf-8").splitlines())
    systems = [row["system"] for row in _rows(folder / "compare" / "answers.jsonl")]
    counts = sorted({systems.count(name) for name in systems})
    return {
        "name": "test prompts answered by each system",
        "passed": counts == [asked],
        "detail": f"{', '.join(map(str, counts))} of {asked}",
    }


def _above(systems: dict[str, Any], better: str, worse: str) -> dict[str, Any]:
    """By more than the 95% interval of the difference of two means, from the half widths of their own."""
    margin = systems[better]["true_score"] - systems[worse]["true_score"]
    interval = math.hypot(_half_width(systems[better]), _half_width(systems[worse]))
    return {
        "name": f"true score of {better} above {worse}",
        "passed": margin > interval,
        "detail": f"{systems[better]['true_score']:.3f} against {systems[worse]['true_score']:.3f}; "
        f"the difference {margin:+.3f} must exceed its 95% interval, {interval:.3f}",
    }


def _half_width(figures: dict[str, Any]) -> float:
    return float(figures["true_score_high"] - figures["true_score_low"]) / 2


def _bounded(name: str, value: float, bound: float) -> dict[str, Any]:
    return {"name": name, "passed": value <= bound, "detail": f"{value:.3g}, bound {bound:.3g}"}


def _gap(folder: Path) -> float:
    """On a GPU the demo runs in bf16, whose rounding the run itself bounds (`rollout.logprob_gap_limit`)."""
    weights = json.loads((folder / "ppo" / "model" / "config.json").read_text(encoding="utf-8"))
    return LOGPROB_GAP_BOUND if weights.get("dtype", "float32") == "float32" else 0.1


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
