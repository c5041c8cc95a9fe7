"""From rows to prompts, answers and ranks."""

import pytest

from gearshift.errors import UserError
from gearshift.rlhf.data.formats import (
    ComparisonText,
    DemonstrationText,
    Keys,
    read_comparison,
    read_demonstration,
    read_document,
    read_prompt,
)
from gearshift.rlhf.data.sources import Record

USER, ANSWER, OTHER = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
)
KEYS = Keys()


def row(**fields):
    return Record(fields, "data.jsonl:7")


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"prompt": "q", "answer": "a"}, "q"),
        ({"prompt": [USER]}, [USER]),
        ({"context": "q"}, "q"),
        ({"inputs": "q", "targets": "a"}, "q"),
        ({"messages": [USER, ANSWER]}, [USER]),
        ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER, USER]),
        ({"chosen": "q\n\nAssistant: yes", "rejected": "q\n\nAssistant: no"}, "q\n\nAssistant:"),
    ],
)  # fmt: skip
def test_prompts(fields, prompt):
    assert read_prompt(row(**fields), KEYS) == prompt


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"prompt": "q", "completion": "a"}, "q"),
        ({"prompt": [USER], "completion": [ANSWER]}, [USER]),
        ({"messages": [USER, OTHER, USER, ANSWER]}, [USER, OTHER, USER]),
        ({"inputs": "q", "targets": "a"}, "q"),
    ],
)
def test_demonstrations(fields, prompt):
    assert read_demonstration(row(**fields), KEYS) == DemonstrationText(prompt, "a")


def test_ranked_answers():
    fields = {"context": "q", "completions": [{"text": "a", "rank": 2}, {"text": "b", "rank": 1.5}]}
    assert read_comparison(row(**fields), KEYS) == ComparisonText("q", ["a", "b"], [2.0, 1.5])
    fields["prompt"] = fields.pop("context")
    assert read_comparison(row(**fields), KEYS).prompt == "q"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": [ANSWER], "rejected": [OTHER]},
    ],
)
def test_pairs_with_a_prompt(fields):
    assert read_comparison(row(**fields), KEYS) == ComparisonText("q", ["a", "b"], [0.0, 1.0])


def test_a_prompt_given_twice_counts_once():
    """UltraFeedback has the prompt as text and again as the first message of both dialogues."""
    pair = read_comparison(row(prompt="q", chosen=[USER, ANSWER], rejected=[USER, OTHER]), KEYS)
    assert pair == ComparisonText([USER], ["a", "b"], [0.0, 1.0])


def test_the_implicit_prompt_ends_with_the_last_turn_that_both_open():
    shared = "\n\nHuman: q\n\nAssistant: one\n\nHuman: more\n\nAssistant:"
    pair = read_comparison(row(chosen=shared + " yes, a", rejected=shared + " yes, b"), KEYS)
    assert pair == ComparisonText(shared, [" yes, a", " yes, b"], [0.0, 1.0])  # not cut at " yes, ", the common prefix
    # the rejected one goes on for another turn after the same words
    pair = read_comparison(row(chosen=shared + " yes", rejected=shared + " yes\n\nHuman: k\n\nAssistant: b"), KEYS)
    assert pair.prompt == shared
    assert pair.completions == [" yes", " yes\n\nHuman: k\n\nAssistant: b"]


def test_configured_keys():
    keys = Keys(prompt="question", completion="answer", text="body", turn="\nBot:")
    assert read_demonstration(row(question="q", answer="a", messages=[]), keys) == DemonstrationText("q", "a")
    assert read_document(row(body="t"), keys) == "t"
    assert read_comparison(row(chosen="q\nBot: a", rejected="q\nBot: b"), keys).prompt == "q\nBot:"


@pytest.mark.parametrize(
    ("read", "fields", "message"),
    [
        (read_prompt, {"question": "q", "id": 1}, "no field 'prompt'; the row has: question, id"),
        (read_prompt, {}, "no field 'prompt'; the row has: no field at all"),
        (read_prompt, {"prompt": 3}, "field 'prompt' must be text, it is int"),
        (read_prompt, {"messages": [ANSWER]}, "no turn before the assistant's"),
        (
            read_prompt,
            {"prompt": "ab\ud83d"},
            "field 'prompt' is not Unicode text: half a surrogate pair at character 2",
        ),
        (read_prompt, {"messages": [{"role": "user", "content": "\ude00"}]}, "field 'messages' is not Unicode text"),
        (read_document, {"body": "t"}, "no field 'text'; the row has: body"),
        (read_demonstration, {"prompt": "q"}, "no field 'completion'; the row has: prompt"),
        (read_demonstration, {"inputs": "q"}, "no field 'targets'; the row has: inputs"),
        (read_demonstration, {"prompt": "q", "completion": None}, "field 'completion' must be text, it is NoneType"),
        (read_demonstration, {"messages": [USER]}, "must end with an assistant's turn"),
        (read_demonstration, {"messages": [{"role": "user"}]}, "must be a list of messages with 'role' and 'content'"),
        (read_comparison, {"prompt": "q", "chosen": "a"}, "no field 'rejected'; the row has: prompt, chosen"),
        (read_comparison, {"chosen": "a", "rejected": "b"}, "share no '\\n\\nAssistant:' turn"),
        (read_comparison, {"chosen": [USER, ANSWER], "rejected": [OTHER, ANSWER]}, "differ before their last turn"),
        (read_comparison, {"context": "q", "completions": [{"text": "a", "rank": 1}]}, "list of two or more answers"),
        (
            read_comparison,
            {"context": "q", "completions": [{"text": "a", "rank": 1}, {"text": "b", "score": 1}]},
            "completions[1] needs 'text' and 'rank'; it has: text, score",
        ),
        (
            read_comparison,
            {"context": "q", "completions": [{"text": "a", "rank": 1}, {"text": "b", "rank": "2"}]},
            "completions[1].rank must be a finite number (lower is better), not '2'",
        ),
    ],
)
def test_a_bad_row_is_one_line_that_says_where_and_what_is_there(read, fields, message):
    with pytest.raises(UserError) as error:
        read(row(**fields), KEYS)
    assert str(error.value).startswith("data.jsonl:7: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
