"""The loader on real data, and GSM8K's preparation; skipped where the data is not there."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from gearshift.errors import UserError
from gearshift.rlhf.data.encoding import Encoder
from gearshift.rlhf.data.formats import Keys, read_comparison
from gearshift.rlhf.data.sources import read_source
from gearshift.rlhf.data.tokenizers import train_tokenizer
from gearshift.rlhf.scorers import gsm8k

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("GEARSHIFT_DATA", ROOT.parent / "shared" / "data"))
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def needs(name):
    path = DATA / name
    return pytest.mark.skipif(
        not path.exists(), reason=f"no {path}: set GEARSHIFT_DATA to the folder that holds {name}"
    )


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "configs/gsm8k-cpu/prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prepared(prepare, tmp_path_factory):
    out = tmp_path_factory.mktemp("gsm8k")
    prepare.prepare(DATA, out)
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in out.iterdir()}


@needs("hh-rlhf/harmless-base-test.jsonl.gz")
def test_hh_rlhf_splits_every_dialogue_at_its_last_shared_turn():
    records = read_source(str(DATA / "hh-rlhf/harmless-base-test.jsonl.gz"))
    assert len(records) == 2_312
    for record in records:
        pair = read_comparison(record, Keys())
        assert pair.prompt.startswith("\n\nHuman:")
        assert pair.prompt.endswith("\n\nAssistant:")
        assert pair.prompt + pair.completions[0] == record.fields["chosen"]
        assert pair.prompt + pair.completions[1] == record.fields["rejected"]


@needs("hh-rlhf/harmless-base-test.jsonl.gz")
def test_hh_rlhf_becomes_comparisons():
    records = read_source(str(DATA / "hh-rlhf/harmless-base-test.jsonl.gz"))[:300]
    tokenizer = train_tokenizer((record.fields["chosen"] for record in records), 1_000)
    encoded = Encoder(tokenizer, max_tokens=512).comparisons(records)
    assert len(encoded.rows) + sum(map(len, encoded.dropped.values())) == 300
    assert len(encoded.rows) > 200
    assert max(len(row.prompt) + len(answer) for row in encoded.rows for answer in row.completions) <= 512
    row = encoded.rows[0]
    assert tokenizer.decode(row.prompt + row.completions[0][:-1]) == records[0].fields["chosen"]


@needs("self-instruct/seed_tasks.jsonl")
def test_self_instruct_needs_only_a_key():
    tokenizer = train_tokenizer(["instruction"], 300)
    encoder = Encoder(tokenizer, Keys(prompt="instruction"))
    assert len(encoder.prompts(read_source(str(DATA / "self-instruct/seed_tasks.jsonl"))).rows) == 175


def test_a_row_becomes_a_task_of_each_kind(prepare):
    row = {"question": "How many are 9 and 9?", "answer": "9 + 9 = <<9+9=18>>18\nSo it is 18.\n#### 18"}
    for mixture, kinds in prepare.TASKS.items():
        for number, kind in enumerate(kinds):
            rows = [
                prepare.task(mixture, number + 3 * i, {**row, "question": f"{i}? {row['question']}"}) for i in range(40)
            ]
            assert {one["task"] for one in rows} == {kind}
            for i, one in enumerate(rows):
                text = row["answer"] if kind == "question" else f"{i}? How many are 9 and 9?"
                assert text in one["inputs"]
                told = {"number": "#### 18", "steps": "2", "question": f"{i}? How many are 9 and 9?"}
                right = "18" in one["inputs"].replace(row["question"], "")
                assert one["targets"] == told.get(kind, "yes" if right else "no")
            frames = {one["inputs"].split("9 and 9?")[-1].split("18")[0] for one in rows}
            assert len(frames) > 1  # under several templates
            if kind == "judge":
                assert 10 < sum(one["targets"] == "yes" for one in rows) < 30


@needs("gsm8k/model_solutions.jsonl")
def test_gsm8k_tasks_are_of_the_training_rows_and_of_their_split(prepared):
    for mixture in ("flan", "t0"):
        for suffix in ("", "_validation"):
            rows, asked = prepared[mixture + suffix], prepared[f"demonstrations{suffix}"]
            assert len(rows) == len(asked)
            for row, demonstration in zip(rows, asked, strict=True):
                whole = row["inputs"] + row["targets"]
                assert demonstration["prompt"] in whole
                assert row["inputs"] != demonstration["prompt"]


@needs("gsm8k/model_solutions.jsonl")
def test_gsm8k_is_split_without_overlap(prepared):
    """731 of the 1,319 test questions have both a correct and a wrong solution; the counts follow from the hashes."""
    sizes = {name: len(rows) for name, rows in prepared.items()}
    assert sizes["demonstrations"] + sizes["demonstrations_validation"] == 7_473
    assert sizes["prompts"] == sizes["demonstrations"]
    assert (sizes["comparisons"], sizes["comparisons_validation"], sizes["prompts_test"]) == (449, 129, 265)
    parts = [{row["context"] for row in prepared[name]} for name in ("comparisons", "comparisons_validation")]
    parts += [{row["prompt"] for row in prepared[name]} for name in ("prompts", "prompts_validation", "prompts_test")]
    assert sum(map(len, parts)) == len(set().union(*parts))


@needs("gsm8k/model_solutions.jsonl")
def test_gsm8k_correct_solutions_rank_before_wrong_ones(prepared):
    truth = {row.fields["question"]: row.fields["answer"] for row in read_source(str(DATA / "gsm8k/test.jsonl"))}
    for row in prepared["comparisons"] + prepared["comparisons_validation"]:
        assert {answer["rank"] for answer in row["completions"]} == {0, 1}
        for answer in row["completions"]:
            assert gsm8k({"answer": truth[row["context"]]}, answer["text"]) == 1 - answer["rank"]


@needs("gsm8k/model_solutions.jsonl")
def test_the_scorer_agrees_with_every_published_judgement():
    for record in read_source(str(DATA / "gsm8k/model_solutions.jsonl")):
        right = record.fields["ground_truth"].rpartition("A:")[2]
        for model in MODELS:
            solution = record.fields[model]["solution"].rpartition("A:")[2]
            assert gsm8k({"answer": right}, f"#### {solution}") == float(record.fields[model]["is_correct"])


@needs("gsm8k/model_solutions.jsonl")
def test_gsm8k_demonstrations_score_full_marks(prepared):
    for prompt, demonstration in zip(prepared["prompts"], prepared["demonstrations"], strict=True):
        assert prompt["prompt"] == demonstration["prompt"]
        assert gsm8k(prompt, demonstration["completion"]) == 1.0


def test_preparation_says_which_file_is_missing(prepare, tmp_path, capsys):
    assert prepare.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "gsm8k/train.jsonl: no such file" in capsys.readouterr().err
    assert prepare.main([]) == 2


def test_shakespeare_is_cut_at_empty_lines_and_nothing_is_lost(prepare):
    text = "\n\n".join(f"speech {number} " + "x" * 300 for number in range(40))
    pieces = [row["text"] for row in prepare.documents(text)]
    assert "\n\n".join(pieces) == text
    assert len(pieces) > 4


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        ("18", "so 9 * 2 = 18\n#### 18", 1), ("18", "#### 18.0", 1), ("1234", "#### $1,234", 1), ("-3", "####-3", 1),
        ("0", "#### 0", 1), (["7", "18"], "#### 18", 1), ("so 9\n#### 18", "#### 18", 1), ("so 0\n#### 0", "#### 0", 1),
        ("0.5", "#### .5", 1),
        ("18", "18", 0), ("18", "#### 19", 0), ("18", "", 0), ("18", "#### x", 0), ("18", "#### 17\n#### 18", 0),
    ],
)  # fmt: skip
def test_gsm8k_scores(answer, response, score):
    assert gsm8k({"answer": answer}, response) == score


def test_a_row_without_a_number_is_an_error():
    with pytest.raises(UserError, match="neither a number nor a solution"):
        gsm8k({"answer": "eighteen"}, "#### 18")
