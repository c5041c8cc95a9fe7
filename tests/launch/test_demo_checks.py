"""Each claim of the demo holds for a folder that shows it, and fails for one that does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gearshift.launch.demo import checks
from gearshift.launch.demo.checks import check

SYSTEMS = ("base", "sft", "ppo", "ppo-ptx")
PROMPTS = 5


def write(path: Path, *rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def scores(**changes: float) -> dict[str, dict[str, float]]:
    """True scores 0.1, 0.4, 0.7 and 0.7, each with an interval of ±0.05; a KL below the bound."""
    values = {"base": 0.1, "sft": 0.4, "ppo": 0.7, "ppo-ptx": 0.7, **changes}
    kl = 0.9 * checks.KL_BOUND
    return {
        name: {"true_score": true, "true_score_low": true - 0.05, "true_score_high": true + 0.05, "kl": kl}
        for name, true in values.items()
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a demo leaves, in so far as its checks read it; all of them hold."""
    write(tmp_path / "world/prompts_test.jsonl", *[{"prompt": str(i)} for i in range(PROMPTS)])
    write(tmp_path / "compare/systems.json", scores())
    write(tmp_path / "compare/answers.jsonl", *[{"system": s, "id": i} for s in SYSTEMS for i in range(PROMPTS)])
    for name in ("ppo", "ppo-ptx"):
        gaps = [{"step": step, "rollout/logprob_gap": 0.5 * checks.LOGPROB_GAP_BOUND} for step in (1, 2)]
        write(tmp_path / name / "metrics.jsonl", *gaps, {"step": 3, "objective/kl": 1.0})
        write(tmp_path / name / "model/config.json", {"dtype": "float32"})
    return tmp_path


def failed(folder: Path) -> list[str]:
    found = check(folder)
    assert len(found) == 8
    assert len({one["name"] for one in found}) == 8
    return [one["name"] for one in found if not one["passed"]]


def test_a_folder_that_shows_everything(folder: Path) -> None:
    assert failed(folder) == []


def unanswered(folder: Path) -> None:
    write(folder / "compare/answers.jsonl", *[{"system": s, "id": i} for s in SYSTEMS for i in range(PROMPTS - 1)])


def unanswered_by_one(folder: Path) -> None:
    rows = [{"system": s, "id": i} for s in SYSTEMS for i in range(PROMPTS)]
    write(folder / "compare/answers.jsonl", *rows[:-1])


def too_close(name: str, true: float) -> Callable[[Path], None]:
    return lambda folder: write(folder / "compare/systems.json", scores(**{name: true}))


def far_away(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        systems = scores()
        systems[name]["kl"] = 1.01 * checks.KL_BOUND
        write(folder / "compare/systems.json", systems)

    return change


def gap_in(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        gaps = (0.5, 1.01, 0.5)  # one iteration alone is over
        write(folder / name / "metrics.jsonl", *[{"rollout/logprob_gap": g * checks.LOGPROB_GAP_BOUND} for g in gaps])

    return change


# The interval of a difference is √2 · 0.05 = 0.0707: 0.07 above is not enough.
@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (unanswered, "test prompts answered by each system"),
        (unanswered_by_one, "test prompts answered by each system"),
        (too_close("base", 0.33), "true score of sft above base"),
        (too_close("ppo", 0.47), "true score of ppo above sft"),
        (too_close("ppo-ptx", 0.3), "true score of ppo-ptx above sft"),
        (far_away("ppo"), "ppo: mean KL per response, nats"),
        (far_away("ppo-ptx"), "ppo-ptx: mean KL per response, nats"),
        (gap_in("ppo"), "ppo: largest gap of rollout and training log-probs, nats"),
        (gap_in("ppo-ptx"), "ppo-ptx: largest gap of rollout and training log-probs, nats"),
    ],
)
def test_one_claim_that_does_not_hold(folder: Path, spoil: Callable[[Path], None], name: str) -> None:
    spoil(folder)
    assert failed(folder) == [name]


def test_a_difference_just_over_its_interval_is_enough(folder: Path) -> None:
    too_close("ppo", 0.4 + 0.0708)(folder)
    assert failed(folder) == []


def test_in_bf16_the_gap_is_that_of_rounding(folder: Path) -> None:
    for name in ("ppo", "ppo-ptx"):
        write(folder / name / "model/config.json", {"dtype": "bfloat16"})
    gap_in("ppo")(folder)
    assert failed(folder) == []
