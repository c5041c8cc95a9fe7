"""The toy world: what its files promise."""

import hashlib
import json
from collections import Counter

import pytest

from gearshift.rlhf import toyworld as world
from gearshift.rlhf.data.encoding import Encoder
from gearshift.rlhf.data.sources import read_source
from gearshift.rlhf.data.tokenizers import train_tokenizer

# Of all files together: the same world on every machine and Python. Change it when the world is meant to change.
DIGEST = "e5457af9560a3c5151faa056c972a596361191d7494ad7f758a17902b36e54d9"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return world.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def rows(paths):
    return {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in paths.items()}


def test_what_the_report_says_of_the_world_is_plain_json():
    about = world.about()
    assert json.loads(json.dumps(about)) == about
    assert about["kinds"] == ["copy", "twice", "reverse", "first", "middle", "last", "plural", "sum"]
    assert (about["labeler_error_rate"], about["test_prompts"]) == (0.1, 500)


def words_of(text):
    return {word for word in text.replace(".", " ").replace("?", " ").split() if word.isupper()}


def test_the_files_are_the_same_everywhere(paths):
    together = hashlib.sha256(b"".join(path.read_bytes() for path in paths.values())).hexdigest()
    assert together == DIGEST


def test_sizes(rows):
    assert {name: len(those) for name, those in rows.items() if name != "tokenizer"} == {
        "pretraining": 56_000, "pretraining_heldout": 500,
        "demonstrations": 5_000, "demonstrations_validation": 300,
        "comparisons": 3_500, "comparisons_validation": 300,
        "prompts": 5_000, "prompts_validation": 200, "prompts_test": 500,
    }  # fmt: skip


def test_what_is_tested_is_neither_asked_nor_told_in_training(rows):
    told = [row["text"] for row in rows["pretraining"]]
    trained = rows["demonstrations"] + rows["comparisons"] + rows["prompts"]
    asked = [row.get("prompt") or row["context"] for row in trained]
    assert len({row["prompt"] for row in rows["prompts_test"]}) == 500
    known = set().union(*map(words_of, told + asked))
    for name in ("prompts_test", "prompts_validation", "demonstrations_validation", "comparisons_validation"):
        for row in rows[name]:
            question = row.get("prompt") or row["context"]
            assert question not in asked
            assert not words_of(question) & known
    assert words_of("reverse MIP.") == {"MIP"}  # else the above shows nothing
    assert len(known) > 1_500


def test_test_and_validation_share_no_prompt(rows):
    assert not {row["prompt"] for row in rows["prompts_test"]} & {row["prompt"] for row in rows["prompts_validation"]}


def test_every_kind_is_tested(rows):
    kinds = Counter(row["kind"] for row in rows["prompts_test"])
    assert set(kinds) == {kind.name for kind in world.KINDS}
    assert min(kinds[kind.name] for kind in world.KINDS[:-1]) >= 60


@pytest.mark.parametrize(
    ("kind", "content", "answer"),
    [
        ("copy", "MIP", "MIP"), ("twice", "MIP", "MIP MIP"), ("reverse", "MIP", "PIM"), ("first", "MIP", "M"),
        ("middle", "MIP", "I"), ("last", "MIP", "P"), ("plural", "MIP", "MIPS"), ("plural", "MAX", "MAXES"),
        ("sum", "9 + 8", "17"),
    ],
)  # fmt: skip
def test_answers(kind, content, answer):
    assert {one.name: one for one in world.KINDS}[kind].answer(content) == answer


def test_true_score_takes_the_answer_and_nothing_else():
    row = {"prompt": "reverse MIP.", "answer": ["PIM"], "kind": "reverse"}
    right = ["PIM", " PIM ", "\nPIM", "PIM \nand more"]
    wrong = ["", " \n", "pim", "PIM.", "PIMS", "well, it is PIM.", "PIM PIM", "i am not sure.", "no\nPIM"]
    assert [world.true_score(row, text) for text in right] == [1.0] * len(right)
    assert [world.true_score(row, text) for text in wrong] == [0.0] * len(wrong)


def test_every_prompt_has_its_right_answer(rows):
    """The answer comes back out of the prompt's own text, by another way than the one that wrote it."""
    for row in rows["prompts_test"]:
        if row["kind"] == "sum":
            numbers = [
                int(part) for part in row["prompt"].replace(".", " ").replace("?", " ").split() if part.isdigit()
            ]
            assert row["answer"] == [str(sum(numbers))]
        elif row["kind"] == "reverse":
            assert row["answer"] == ["".join(reversed(*words_of(row["prompt"])))]


def manner(question, text):
    """How a labeler answered, from the text alone."""
    if text in world.REFUSALS:
        return "refusal"
    if text in [rambling.format(question.answer) for rambling in world.RAMBLINGS]:
        return "rambling"
    return "right" if text == question.answer else "wrong"


@pytest.fixture(scope="module")
def questions():
    contents = world.all_words(), world.all_sums()
    every = [
        world.Question(kind, content, ask.format(content) + world.END_OF_QUESTION)
        for kind in world.KINDS
        for content in contents[kind.name == "sum"]
        for ask in kind.questions
    ]
    assert len({question.prompt for question in every}) == len(every)
    return {question.prompt: question for question in every}


def test_labelers_answer_at_the_stated_rates(rows, questions):
    manners = Counter(manner(questions[row["prompt"]], row["completion"]) for row in rows["demonstrations"])
    for name, rate in world.LABELER.items():
        assert manners[name] / 5_000 == pytest.approx(rate, abs=0.02)  # three standard errors: 0.02


def test_comparisons_rank_four_different_answers_and_err_at_the_stated_rate(rows, questions):
    """Read where one good answer stands against three wrong ones: its rank is then how often the labeler slipped."""
    slips = judgements = 0
    for row in rows["comparisons"]:
        texts = [answer["text"] for answer in row["completions"]]
        assert len(set(texts)) == 4
        qualities = [world.QUALITY[manner(questions[row["context"]], text)] for text in texts]
        if sorted(qualities)[:3] == [0, 0, 0] and max(qualities) > 0:
            slips += row["completions"][qualities.index(max(qualities))]["rank"]
            judgements += 3
    assert judgements > 600
    assert slips / judgements == pytest.approx(world.JUDGEMENT_ERROR, abs=0.03)  # two and a half standard errors


def test_without_errors_the_ranks_follow_quality(monkeypatch):
    monkeypatch.setattr(world, "JUDGEMENT_ERROR", 0.0)
    assert world._judge(world.seeded("test"), [3, 0, 2, 0]) == [0, 2, 1, 2]


def test_words_are_letters_and_the_rest_is_whole_to_the_trained_tokenizer(rows):
    tokenizer = train_tokenizer([row["text"] for row in rows["tokenizer"]], world.VOCAB_SIZE)
    signs = ["what", "Ġis", "Ġ", "M", "I", "P", "Ġin", "Ġreverse", "?", "Ġ"]
    assert tokenizer.tokenize("what is MIP in reverse? ") == signs  # the last as before a word in prose
    assert tokenizer.tokenize("PIM") == ["P", "I", "M"]
    assert tokenizer.tokenize("12 + 3") == ["1", "2", "Ġ", "+", "Ġ", "3"]


def test_the_package_reads_its_own_world_and_every_text_is_short(paths, rows):
    tokenizer = train_tokenizer([row["text"] for row in rows["tokenizer"]], world.VOCAB_SIZE)
    encoder = Encoder(tokenizer, max_prompt_tokens=16, max_tokens=32)
    assert encoder.prompts(read_source(str(paths["prompts"]))).dropped == {}
    assert encoder.demonstrations(read_source(str(paths["demonstrations"]))).dropped == {}
    comparisons = encoder.comparisons(read_source(str(paths["comparisons"])))
    assert list(comparisons.dropped) == ["without two different answers of different rank"]
    assert len(comparisons.rows) > 3_400
    tokens = sum(len(block.tokens) - 1 for block in encoder.blocks(read_source(str(paths["pretraining"]))).rows)
    assert 600_000 < tokens < 900_000
