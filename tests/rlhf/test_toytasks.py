"""The toy world's FLAN and T0 data: what its rows promise."""

import json
import re
from collections import Counter

import pytest

from gearshift.rlhf import toytasks, toyworld
from gearshift.rlhf.data.encoding import Encoder
from gearshift.rlhf.data.sources import read_source
from gearshift.rlhf.data.tokenizers import train_tokenizer


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return toytasks.write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def rows(paths):
    return {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in paths.items()}


def words_of(text):
    return {word for word in text.replace(".", " ").replace(":", " ").replace("?", " ").split() if word.isupper()}


def test_sizes_and_every_task_under_every_template(rows):
    assert {name: len(those) for name, those in rows.items()} == {
        "flan": 6_000, "flan_validation": 300, "t0": 6_000, "t0_validation": 300
    }  # fmt: skip
    for mixture, tasks in toytasks.MIXTURES.items():
        assert Counter(row["task"] for row in rows[mixture]) == {task.name: 1_200 for task in tasks}
        for task in tasks:
            assert len(task.templates) >= 2
            asked = [row["inputs"] for row in rows[mixture] if row["task"] == task.name]
            for template in task.templates:
                form = re.escape(template).replace(r"\ ", " ")
                assert any(re.fullmatch(re.sub(r"\\{\w+\\}", ".+", form) + " ", text) for text in asked), template


def test_a_written_twice_world_is_the_same(paths, tmp_path):
    again = toytasks.write_tasks(tmp_path)
    assert [again[name].read_bytes() for name in paths] == [path.read_bytes() for path in paths.values()]


def test_no_row_asks_what_people_ask(rows):
    asked = {row["prompt"] for split in ("train", "validation", "test") for row in toyworld.prompts(split, 150)}
    frames = [ask.split("{}") for kind in toyworld.KINDS for ask in kind.questions]
    for row in (row for those in rows.values() for row in those):
        assert row["inputs"] not in asked
        body = row["inputs"].removesuffix(toyworld.END_OF_QUESTION)
        assert not any(body.startswith(start) and body.endswith(end) and start and end for start, end in frames)


def test_words_of_validation_and_test_are_not_trained_on(rows):
    for mixture in toytasks.MIXTURES:
        words = set().union(*(words_of(row["inputs"]) for row in rows[mixture]))
        three = [word for word in words if len(word) == 3]
        assert len(three) > 1_000
        assert {toyworld.split_of(word) for word in three} == {"train"}
        held = set().union(*(words_of(row["inputs"]) for row in rows[f"{mixture}_validation"]))
        assert {toyworld.split_of(word) for word in held if len(word) == 3} == {"validation"}


def test_answers_come_back_out_of_the_text(rows):
    """By another way than the one that drew them: from the words and letters that the row shows."""
    for row in rows["flan"] + rows["t0"]:
        inputs, targets = row["inputs"], row["targets"]
        words = [word.strip(".,:?") for word in inputs.split()]
        named = [word for word in words if len(word) == 3 and word.isupper()]
        letter = next((word for word in words if len(word) == 1 and word.isupper()), None)
        if row["task"] == "starts":
            assert targets == ("yes" if named[0].startswith(letter) else "no")
        elif row["task"] == "ends":
            assert targets == ("yes" if named[0].endswith(letter) else "no")
        elif row["task"] == "alike":
            assert targets == ("yes" if named[0][1:] == named[1][1:] else "no")
        elif row["task"] == "sooner":
            assert targets == sorted(named)[0]
        elif row["task"] == "more":
            assert int(targets) == max(int(word) for word in words if word.isdigit())
        else:
            assert targets in inputs.split() or f"{targets}." in inputs.split()


def test_yes_and_no_are_about_as_frequent(rows):
    for mixture in ("flan", "t0"):
        said = Counter(row["targets"] for row in rows[mixture] if row["targets"] in ("yes", "no"))
        assert 0.4 < said["yes"] / sum(said.values()) < 0.6


def test_the_package_reads_them_as_demonstrations(paths):
    texts = [row["text"] for row in toyworld.tokenizer_text()]
    encoder = Encoder(train_tokenizer(texts, toyworld.VOCAB_SIZE), max_prompt_tokens=96, max_tokens=104)
    for path in paths.values():
        assert encoder.demonstrations(read_source(str(path))).dropped == {}
