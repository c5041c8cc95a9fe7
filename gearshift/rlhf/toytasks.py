"""Public tasks of the toy world, for its FLAN and T0 baselines: rows of `inputs` and `targets`, templates by the task.

As in the paper's two data sets, they are not what people ask for: questions about a story, yes-or-no questions about
words, choices and comparisons, each under several templates. No row asks what a prompt of `toyworld` asks, and none
is written as one. FLAN's (Wei et al. 2021) end with their options where an answer is one of a few; T0's (P3, Sanh et
al. 2021) are phrased each in its own way, as a person who writes prompts would. The two share some tasks, as theirs do.
Words are those of the training split, but for the validation rows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gearshift.rlhf.toyworld import CREATURES, END_OF_QUESTION, all_words, seeded, split_of, story

ROWS, ROWS_VALIDATION = 6_000, 300  # of each of the two mixtures

Case = dict[str, str]  # what fills a template; `answer` is its target


@dataclass(frozen=True)
class Task:
    """One task of a mixture: how a case of it is drawn from words of a split, and its templates."""

    name: str
    draw: Callable[[random.Random, list[str]], Case]
    templates: tuple[str, ...]


def _about_story(answer: str) -> Callable[[random.Random, list[str]], Case]:
    """A story, and one of the things that it says: its `creature`, `place` or `food`."""

    def draw(rng: random.Random, words: list[str]) -> Case:
        text = story(rng)
        creature = next(name for name in CREATURES if f" {name} " in text)
        place, food = CREATURES[creature]
        told = {"creature": creature, "place": place, "food": food}
        return {"story": text, **told, "answer": told[answer]}

    return draw


def _letter(at: int) -> Callable[[random.Random, list[str]], Case]:
    """A word and a letter, which is the word's letter at that place every other time."""

    def draw(rng: random.Random, words: list[str]) -> Case:
        word, other = rng.choice(words), rng.choice(words)
        letter = word[at] if rng.random() < 0.5 else other[at]
        return {"word": word, "letter": letter, "answer": _yes(letter == word[at])}

    return draw


def _alike(rng: random.Random, words: list[str]) -> Case:
    """Two words that end alike every other time."""
    one = rng.choice(words)
    rhymes = [word for word in words if word[1:] == one[1:] and word != one] if rng.random() < 0.5 else []
    other = rng.choice(rhymes or words)
    return {"one": one, "other": other, "answer": _yes(one[1:] == other[1:])}


def _sooner(rng: random.Random, words: list[str]) -> Case:
    one, other = rng.sample(words, 2)
    return {"one": one, "other": other, "answer": min(one, other)}


def _more(rng: random.Random, words: list[str]) -> Case:
    one, other = rng.sample(range(20), 2)
    return {"one": str(one), "other": str(other), "answer": str(max(one, other))}


def _yes(true: bool) -> str:
    return "yes" if true else "no"


OPTIONS = " options: yes, no."
FLAN = (
    Task(
        "place",
        _about_story("place"),
        ("{story} where did the {creature} go?", "read this: {story} question: what place is it about?"),
    ),
    Task(
        "food",
        _about_story("food"),
        ("{story} what is it that the {creature} has in mind?", "{story} name the food in this story."),
    ),
    Task(
        "starts",
        _letter(0),
        (
            "does {word} start with {letter}?" + OPTIONS,
            "is {letter} the first letter of {word}?" + OPTIONS,
            "true of {word}: it starts with {letter}?" + OPTIONS,
        ),
    ),
    Task(
        "alike",
        _alike,
        ("do {one} and {other} rhyme?" + OPTIONS, "{one} and {other}: do they end the same way?" + OPTIONS),
    ),
    Task(
        "more",
        _more,
        ("which is more? options: {one}, {other}.", "the larger number of the two? options: {one}, {other}."),
    ),
)
T0 = (
    Task(
        "creature",
        _about_story("creature"),
        ("{story} who is this story about?", "in the story below, which animal went to the {place}? {story}"),
    ),
    Task(
        "place",
        _about_story("place"),
        ("{story} if you were looking for the {creature}, where would you go?", "{story} the place in it:"),
    ),
    Task(
        "ends",
        _letter(2),
        (
            "yes or no: is {letter} the last letter of {word}?",
            "i say that {word} ends with {letter}. am i right, yes or no?",
            "{word}. is there {letter} at its end, yes or no?",
        ),
    ),
    Task(
        "alike",
        _alike,
        ("would {one} be a rhyme for {other}, yes or no?", "a poet ends two lines with {one} and {other}. a rhyme?"),
    ),
    Task(
        "sooner",
        _sooner,
        ("{one} or {other}: which is sooner in the alphabet?", "you look up {one} and {other}. which comes first?"),
    ),
)
MIXTURES = {"flan": FLAN, "t0": T0}


def write_tasks(folder: str | Path) -> dict[str, Path]:
    """Writes both mixtures, for training and validation, as JSON lines; returns their paths by name."""
    paths = {}
    for mixture in MIXTURES:
        for name, split, count in ((mixture, "train", ROWS), (f"{mixture}_validation", "validation", ROWS_VALIDATION)):
            paths[name] = Path(folder) / f"{name}.jsonl"
            text = "".join(json.dumps(row) + "\n" for row in rows(mixture, split, count))
            paths[name].write_text(text, encoding="utf-8", newline="\n")
    return paths


def rows(mixture: str, split: str, count: int) -> list[dict[str, str]]:
    """`inputs`, `targets` and `task`: every task of the mixture in equal parts, its templates at random."""
    rng = seeded(f"{mixture}/{split}")
    words = [word for word in all_words() if split_of(word) == split]
    made = []
    for number in range(count):
        task = MIXTURES[mixture][number % len(MIXTURES[mixture])]
        case = task.draw(rng, words)
        inputs = rng.choice(task.templates).format(**case) + END_OF_QUESTION
        made.append({"inputs": inputs, "targets": case["answer"], "task": task.name})
    rng.shuffle(made)
    return made
