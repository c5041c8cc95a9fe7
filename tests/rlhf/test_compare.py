"""Systems side by side: the figures of the table, and one whole comparison on two ranks."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import World
from gearshift.errors import UserError
from gearshift.launch.config import validate
from gearshift.rlhf.compare import compare, load_checker, summary
from tests.rlhf.tiny import Recorder, prompt_rows, save_policy, save_reward_model, text_rows, write_jsonl
from tests.worker_group import WorkerGroup


def answer(score: float, kl: float, length: int, finished: bool, **more: float) -> dict[str, Any]:
    return {"score": score, "kl": kl, "length": length, "finished": finished, **more}


def test_summary_of_a_list_made_by_hand() -> None:
    """True scores 1, 0, 1, 1: mean 3/4, s² = (3/16 + 9/16) / 3 = 1/4, half width 1.96 · (1/2) / √4 = 0.49."""
    answers = [
        answer(1.0, 0.5, 3, True, true_score=1.0),
        answer(-2.0, 1.5, 8, False, true_score=0.0),
        answer(4.0, 0.0, 2, True, true_score=1.0),
        answer(0.0, -1.0, 3, True, true_score=1.0),
    ]
    expected = {
        "score": 0.75,
        "kl": 0.25,
        "length": 4.0,
        "finished": 0.75,
        "pretraining_loss": 2.5,
        "true_score": 0.75,
        "true_score_ci95": 0.49,
    }
    assert summary(answers, 2.5) == pytest.approx(expected)


def test_summary_of_500_yes_and_no_is_the_binomial_interval() -> None:
    answers = [answer(0, 0, 1, True, true_score=float(i < 200)) for i in range(500)]
    found = summary(answers, None)
    assert found["true_score"] == pytest.approx(0.4)
    assert found["true_score_ci95"] == pytest.approx(1.96 * math.sqrt(0.4 * 0.6 / 499), rel=1e-9)
    assert "pretraining_loss" not in found


def test_summary_of_one_answer_has_no_spread() -> None:
    found = summary([answer(1, 0, 1, True, true_score=1.0)], None)
    assert (found["true_score"], found["true_score_ci95"]) == (1.0, 0.0)
    assert set(summary([answer(1, 0, 1, True)], None)) == {"score", "kl", "length", "finished"}


def test_a_checker_is_a_function_of_a_module() -> None:
    assert load_checker(None) is None
    assert load_checker("tests.rlhf.test_compare:is_long") is is_long


@pytest.mark.parametrize("name", ["no.such.module:score", "tests.rlhf.test_compare:nothing", "math", ":score", ".x:y"])
def test_a_checker_that_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=r"compare\.true_score: .*module:function") as caught:
        load_checker(name)
    assert "\n" not in str(caught.value)


def is_long(row: dict[str, Any], response: str) -> float:
    """The checker of the comparison below: it reads the prompt's row and the answer."""
    return float(row["answer"] % 2 == 0 and len(response) > 2)


def compare_systems(world: World, values: dict[str, Any]) -> Recorder:
    config: Any = validate("compare", values)
    Path(config.run.folder).mkdir(exist_ok=True)
    report = Recorder()
    compare(config, report)
    return report


def test_a_comparison_on_two_ranks(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    """Five prompts over two ranks in micro-batches of 2 (one rank has one more): both ranks come to the end.

    The reference's own KL is 0; another model's is not, nor its own behind a prefix, which only the writer sees. The
    figures are those of the answers that are written.
    """
    first, other = save_policy(tmp_path / "first"), save_policy(tmp_path / "other", seed=7)
    values = {
        "run": {"folder": str(tmp_path / "run")},
        "data": {"validation": write_jsonl(tmp_path / "prompts.jsonl", prompt_rows(7))},
        "systems": {
            "first": {"init": str(first)},
            "other": {"init": str(other)},
            "prompted": {"init": str(first), "prefix": "go there "},
        },
        "reference": {"init": str(first)},
        "reward": {"init": str(save_reward_model(tmp_path / "reward"))},
        "rollout": {"tp_size": 2, "max_new_tokens": 6},
        "ptx": {"validation": [write_jsonl(tmp_path / "text.jsonl", text_rows(3))], "max_tokens": 16},
        "compare": {"prompts": 5, "micro_batch_size": 2, "true_score": "tests.rlhf.test_compare:is_long"},
    }
    two_ranks.run(compare_systems, values, timeout=60)
    systems = json.loads((tmp_path / "run/systems.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run/answers.jsonl").read_text().splitlines()]
    assert [(row["system"], row["id"]) for row in rows] == [(s, i) for s in values["systems"] for i in range(5)]
    assert max(abs(row["kl"]) for row in rows[:5]) < 1e-4
    assert max(abs(row["kl"]) for row in rows[5:10]) > 0.05
    assert max(abs(row["kl"]) for row in rows[10:]) > 1e-3
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in prompt_rows(5)] * 3
    for name, found in systems.items():
        own = [row for row in rows if row["system"] == name]
        assert found == pytest.approx(summary(own, found["pretraining_loss"]))
        assert 1 < found["pretraining_loss"] < 30
        assert {row["true_score"] for row in own if row["id"] % 2} == {0.0}
    assert set(rows[0]) == {
        "system", "id", "prompt", "response", "score", "kl", "length", "finished", "true_score"
    }  # fmt: skip
    assert len({row["length"] for row in rows}) > 1
    check_text_loss(first, tmp_path / "text.jsonl", systems["first"]["pretraining_loss"])


def check_text_loss(folder: Path, text: Path, found: float) -> None:
    """The loss on text from `transformers`' own logits, over every token of the stream but the first."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    stream: list[int] = []
    for line in text.read_text().splitlines():
        stream += [*tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    losses = []
    for start in range(0, len(stream) - 1, 16):
        tokens = torch.tensor(stream[start : start + 17])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(tokens[None, :-1]).logits[0].double(), -1)
        losses += (-logprobs.gather(1, tokens[1:, None])[:, 0]).tolist()
    assert len(losses) == len(stream) - 1
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)
