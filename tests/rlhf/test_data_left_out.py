"""Rows that cannot be used: each kind is told by file and line, or left out, counted and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gearshift.errors import UserError
from gearshift.launch.config import load
from gearshift.launch.tracking import Tracker
from gearshift.rlhf.data.encoding import Encoder
from gearshift.rlhf.data.sources import read_sources
from gearshift.rlhf.data.tokenizers import train_tokenizer
from tests.rlhf.tiny import save_policy

GOOD = {"prompt": "q", "chosen": "a", "rejected": "b", "by": 0.5}
RANKED = '{"context": "q", "completions": [{"text": "a", "rank": 1}, {"text": "b", "rank": %s}]}'
BROKEN = {
    '{"prompt": "q", "chosen"': "is not valid JSON",
    "[1]": "a row must be a JSON object",
    '{"prompt": "q", "chosen": "a"}': "no field 'rejected'",
    '{"prompt": "", "chosen": "a", "rejected": "b", "by": 1}': "the prompt is empty",
    '{"prompt": "q", "chosen": "a", "rejected": null}': "field 'rejected' must be text",
    RANKED % "NaN": "completions[1].rank must be a finite number",
    RANKED % "1e999": "completions[1].rank must be a finite number",
    RANKED % ("9" * 400): "completions[1].rank must be a finite number",
    '{"prompt": "q", "chosen": "a", "rejected": "b"}': "no field 'by'",
    '{"prompt": "q", "chosen": "a", "rejected": "b", "by": -1}': "field 'by' must be a finite number of 0 or more",
}
FILTERED = {
    json.dumps({**GOOD, "rejected": "a"}): "without two different answers of different rank",
    RANKED % "1": "without two different answers of different rank",
    json.dumps({**GOOD, "prompt": "q" * 9}): "over data.max_prompt_tokens=8",
    json.dumps({**GOOD, "rejected": "b" * 40}): "over data.max_tokens=32",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["the cat sat on the mat"], 258)


def encoder(tokenizer: Any, policy: Any) -> Encoder:
    from gearshift.rlhf.data.formats import Keys

    return Encoder(tokenizer, Keys(margin="by"), max_prompt_tokens=8, max_tokens=32, on_bad_row=policy)


@pytest.mark.parametrize(("line", "message"), BROKEN.items(), ids=lambda text: text[:40])
def test_a_broken_row_stops_or_is_left_out_by_name(tmp_path: Path, tokenizer: Any, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n{json.dumps(GOOD)}\n")
    with pytest.raises(UserError) as error:
        encoder(tokenizer, "error").comparisons(read_sources([str(path)]))
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)
    found = encoder(tokenizer, "skip").comparisons(read_sources([str(path)]))
    assert (len(found.rows), found.read) == (2, 3)
    assert found.dropped == {"broken": [str(error.value)]}
    assert found.describe() == f"2 of 3 rows; left out: 1 broken ({error.value})"


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_whole_row_without_use_is_left_out_under_either_policy(tmp_path: Path, tokenizer: Any, policy: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), *FILTERED]))
    found = encoder(tokenizer, policy).comparisons(read_sources([str(path)]))
    expected: dict[str, list[str]] = {}
    for number, reason in enumerate(FILTERED.values(), 2):
        expected.setdefault(reason, []).append(f"{path}:{number}")
    assert found.dropped == expected
    assert (len(found.rows), found.read) == (1, 5)


def test_the_other_kinds_of_rows(tmp_path: Path, tokenizer: Any) -> None:
    """Prompts, demonstrations and text; the rows that stay keep their order and their numbers."""
    rows = ['{"prompt": "a", "completion": "b", "text": "t"}', "{", "{}", '{"prompt": "c", "completion": "d"}']
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    skipping, records = encoder(tokenizer, "skip"), read_sources([str(path)])
    prompts = skipping.prompts(records)
    assert [(row.id, row.text, row.origin) for row in prompts.rows] == [(0, "a", f"{path}:1"), (1, "c", f"{path}:4")]
    for found, left_out in ((prompts, 2), (skipping.demonstrations(records), 2), (skipping.blocks(records), 3)):
        assert len(found.dropped["broken"]) == left_out
        with pytest.raises(UserError, match=r"no row of the data is left: 0 of 1 rows; left out: 1 broken"):
            skipping.prompts(records[1:2])


def test_only_some_are_named_in_the_log_and_all_in_the_run_folder(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), *["{}"] * 1200]))
    found = encoder(tokenizer, "skip").prompts(read_sources([str(path)]))
    assert found.describe().startswith(f"1 of 1,201 rows; left out: 1,200 broken ({path}:2: ")
    assert found.describe().endswith(", ...)")
    assert found.describe().count("rows.jsonl") == 3
    config: Any = load_sft(tmp_path, path)
    for _ in range(2):  # a second start does not add to the first's
        with Tracker(tmp_path / "run", [], config) as tracker:
            tracker.left_out("data.train", found.dropped)
    lines = (tmp_path / "run/left_out.txt").read_text().splitlines()
    assert len(lines) == 1200
    assert lines[-1].split("\t")[:2] == ["data.train", "broken"]
    assert lines[-1].split("\t")[2].startswith(f"{path}:1201: no field 'prompt'")


def load_sft(folder: Path, rows: Path, **data: Any) -> Any:
    config = folder / "sft.yaml"
    values = {
        "run": {"folder": str(folder / "run")},
        "policy": {"init": str(save_policy(folder / "policy"))},
        "data": {"train": [str(rows)], "max_tokens": 64, "max_prompt_tokens": 32, **data},
    }
    config.write_text(json.dumps(values))
    return load("sft", config, ranks=2 if data else None)


def test_what_the_policy_allows_is_allowed_before_processes_start(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"data.train: .*rows.jsonl:2: no field 'completion'"):
        load_sft(tmp_path, path, on_bad_row="error")
    load_sft(tmp_path, path, on_bad_row="skip")
