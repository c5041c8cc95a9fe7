"""Systems side by side: the figures of the table, and one whole comparison on two ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import World
from gearshift.errors import UserError
from gearshift.launch.config import validate
from gearshift.rlhf.compare import compare, load_checker
from gearshift.rlhf.standings import summary, win_rates
from tests.rlhf.tiny import Recorder, prompt_rows, save_policy, save_reward_model, text_rows, write_jsonl
from tests.run_folder import unnamed
from tests.worker_group import WorkerGroup


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
    figures are those of the answers that are written. Of two candidates for a prefix the better scored one is used.
    """
    first, other = save_policy(tmp_path / "first"), save_policy(tmp_path / "other", seed=7)
    values = {
        "run": {"folder": str(tmp_path / "run")},
        "data": {"validation": write_jsonl(tmp_path / "prompts.jsonl", prompt_rows(7))},
        "systems": {
            "first": {"init": str(first)},
            "other": {"init": str(other)},
            "prompted": {"init": str(first), "prefixes": ["the cat ", "go there "]},
            "prompted-again": {"init": str(first), "prefix": "go there "},
            "own": {"init": str(first), "max_new_tokens": 1, "top_k": 1, "temperature": 0.5},
        },
        "reference": {"init": str(first)},
        "reward": {"init": str(save_reward_model(tmp_path / "reward"))},
        "rollout": {"tp_size": 2, "max_new_tokens": 6},
        "ptx": {"validation": [write_jsonl(tmp_path / "text.jsonl", text_rows(3))], "max_tokens": 16},
        "compare": {
            "prompts": 5,
            "micro_batch_size": 2,
            "true_score": "tests.rlhf.test_compare:is_long",
            "against": "first",
            "selection": [write_jsonl(tmp_path / "selection.jsonl", prompt_rows(16)[7:])],
            "selection_prompts": 3,
        },
    }
    two_ranks.run(compare_systems, values, timeout=180)
    systems = json.loads((tmp_path / "run/systems.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run/answers.jsonl").read_text().splitlines()]
    candidates_of: dict[str, list[dict[str, Any]]] = {}
    by_name = {name: [row for row in rows if row["system"] == name] for name in values["systems"]}
    assert [(row["system"], row["id"]) for row in rows] == [(s, i) for s in values["systems"] for i in range(5)]
    assert max(abs(row["kl"]) for row in by_name["first"]) < 1e-4
    assert max(abs(row["kl"]) for row in by_name["other"]) > 0.05
    assert max(abs(row["kl"]) for row in by_name["prompted"]) > 1e-3
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in prompt_rows(5)] * 5
    for name, found in systems.items():
        own, candidates = by_name[name], found.pop("prefixes", [])
        candidates_of[name] = candidates
        assert found.pop("against") == "first"
        expected = summary(own, found["pretraining_loss"], 2000, 0) | win_rates(own, by_name["first"], 2000, 0)
        assert found == pytest.approx(expected)
        assert 1 < found["pretraining_loss"] < 30
        assert {row["true_score"] for row in own if row["id"] % 2} == {0.0}
        check_candidates(values["systems"][name].get("prefixes", []), candidates)
        if candidates and candidates[1]["chosen"]:  # that is prompted-again's prefix
            assert [row["response"] for row in own] == [row["response"] for row in by_name["prompted-again"]]
    assert set(rows[0]) == {
        "system", "id", "prompt", "response", "score", "kl", "length", "finished", "true_score"
    }  # fmt: skip
    # On the selection prompts, of which there are others: the same prefix has another score than on the test prompts.
    assert candidates_of["prompted"][1]["score"] != pytest.approx(systems["prompted-again"]["score"])
    assert {row["length"] for row in by_name["own"]} == {1}
    assert max(abs(row["kl"]) for row in by_name["own"]) > 0.05  # the reference stays at the common temperature
    assert (systems["first"]["win_rate"], systems["first"]["win_rate_low"]) == (0.5, 0.5)
    assert len({row["length"] for row in rows}) > 2
    assert "| prompted-again |" in (tmp_path / "run/systems.md").read_text()
    assert unnamed(tmp_path / "run") == []
    check_text_loss(first, tmp_path / "text.jsonl", systems["first"]["pretraining_loss"])


def check_candidates(prefixes: list[str], candidates: list[dict[str, Any]]) -> None:
    """Every candidate is reported, and the one with the best mean score is the one chosen."""
    assert [one["prefix"] for one in candidates] == prefixes
    best = max((one["score"] for one in candidates), default=0.0)
    assert [one["chosen"] for one in candidates] == [one["score"] == best for one in candidates]
    assert all(one["score_low"] <= one["score"] <= one["score_high"] for one in candidates)


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
