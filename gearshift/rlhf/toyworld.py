"""A toy world with checkable answers, made from fixed seeds: the same files on every machine.

People ask small questions about words and sums ("reverse MIP."), each with one right answer ("PIM").
* Pretraining text is half stories, half prose that states the skills in other words ("MIP in reverse is PIM."): a
  base model has the abilities but answers no questions.
* Demonstrations are written by labelers who answer as in `LABELER`: to imitate them is to err as often as they do.
* Comparisons rank four such answers by `QUALITY`, each pairwise judgement wrong with probability `JUDGEMENT_ERROR`.

Words are split by their hash, a word and its reverse together: what a validation or test prompt asks about is asked or
told nowhere in training (though a labeler's slip may spell such a word). Sums are facts and no rule: the prose states
them all, but each is asked about in one split only.

The words are in capitals, the rest is not: a tokenizer trained on the `tokenizer` file, which has none of the words,
writes words and numbers sign by sign and everything else word by word (`VOCAB_SIZE`).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal

SEED = 2203_02155
STORIES, PROSE = 8_000, 48_000  # pretraining documents
HELDOUT_DOCUMENTS = 250  # of each of the two
DEMONSTRATIONS, COMPARISONS, PROMPTS = 5_000, 3_500, 5_000
DEMONSTRATIONS_VALIDATION, COMPARISONS_VALIDATION, PROMPTS_VALIDATION, PROMPTS_TEST = 300, 300, 200, 500
VOCAB_SIZE = 512  # at most, of a byte-level BPE tokenizer that is trained on the `tokenizer` file
LARGEST_ADDEND = 9
VALIDATION_SHARE, TEST_SHARE = 0.06, 0.12  # of the words, and of the sums

Manner = Literal["right", "rambling", "refusal", "wrong"]
LABELER: dict[Manner, float] = {"right": 0.60, "rambling": 0.16, "refusal": 0.12, "wrong": 0.12}
CANDIDATE: dict[Manner, float] = {"right": 0.35, "rambling": 0.25, "refusal": 0.10, "wrong": 0.30}  # what gets ranked
QUALITY: dict[Manner, int] = {"right": 3, "rambling": 2, "refusal": 1, "wrong": 0}
ANSWERS_RANKED = 4  # K
JUDGEMENT_ERROR = 0.10  # two answers of different quality are judged the wrong way round

REFUSALS = ("i am not sure.", "i do not know.", "ask me later.")
RAMBLINGS = ("well, it is {}.", "hm, maybe {}.", "i guess {}, ok?")
END_OF_QUESTION = " "  # every prompt ends with it: answers follow a space, as they do in the prose
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CONSONANTS = "BCDFGHJKLMNPQRSTVWXZ"

# Each creature has its own place and food: what a language model can learn of the stories, and forget.
CREATURES = {
    "fox": ("den", "hen"), "cow": ("field", "grass"), "owl": ("barn", "mouse"), "bear": ("cave", "honey"),
    "duck": ("pond", "bread"), "crow": ("roof", "corn"), "frog": ("swamp", "fly"), "goat": ("hill", "shoe"),
}  # fmt: skip
ADJECTIVES = ("old", "young", "small", "hungry", "happy", "brown")
MOVES = ("went", "ran", "walked", "came back")
TIMES = ("at night", "in the morning", "after the rain", "on a cold day")
EATING = ("ate", "found", "wanted", "looked for")


def _plural(word: str) -> str:
    return word + ("ES" if word[-1] in "SXZ" else "S")


@dataclass(frozen=True)
class Kind:
    """One kind of question: the ways to ask it, the way that prose states the same, and what is right."""

    name: str
    questions: tuple[str, str]
    prose: str
    answer: Callable[[str], str]


KINDS = (
    Kind("copy", ("repeat {}.", "please repeat {}."), "he would repeat {}: {answer}.", str),
    Kind("twice", ("say {} twice.", "{} twice, please."), "she said {} twice: {answer}.", lambda w: f"{w} {w}"),
    Kind("reverse", ("reverse {}.", "what is {} in reverse?"), "{} in reverse is {answer}.", lambda w: w[::-1]),
    Kind("first", ("{} starts with?", "what is the start of {}?"), "{} starts with {answer}.", lambda w: w[0]),
    Kind("middle", ("{} goes round?", "what is inside {}?"), "{} goes round {answer}.", lambda w: w[1]),
    Kind("last", ("{} ends with?", "what is the end of {}?"), "{} ends with {answer}.", lambda w: w[-1]),
    Kind("plural", ("plural of {}?", "what are two of {}?"), "the plural of {} is {answer}.", _plural),
    Kind("sum", ("what is {}?", "add {}."), "{} is {answer}.", lambda sum_: str(sum(map(int, sum_.split(" + "))))),
)


@dataclass(frozen=True)
class Question:
    """`content` is the word or the sum that is asked about."""

    kind: Kind
    content: str
    prompt: str

    @property
    def answer(self) -> str:
        return self.kind.answer(self.content)


def true_score(row: dict[str, Any], response: str) -> float:
    """1 if the first line of the response is an accepted answer (`row["answer"]`) and nothing else, 0 if not."""
    lines = response.strip().splitlines()
    return float(bool(lines) and lines[0].strip() in row["answer"])


def about() -> dict[str, Any]:
    """The world's constants, for a report."""
    return {
        "seed": SEED,
        "kinds": [kind.name for kind in KINDS],
        "words": len(all_words()),
        "pretraining_documents": STORIES + PROSE,
        "demonstrations": DEMONSTRATIONS,
        "labelers_answer": dict(LABELER),
        "comparisons": COMPARISONS,
        "answers_ranked": ANSWERS_RANKED,
        "ranked_answers_are": dict(CANDIDATE),
        "labeler_error_rate": JUDGEMENT_ERROR,
        "prompts": PROMPTS,
        "test_prompts": PROMPTS_TEST,
    }


def write_world(folder: str | Path) -> dict[str, Path]:
    """Writes the world's files (see the module) as JSON lines; returns their paths by name, without suffix."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Iterable[dict[str, Any]]] = {
        "tokenizer": tokenizer_text(),
        "pretraining": pretraining("pretraining", STORIES, PROSE),
        "pretraining_heldout": pretraining("pretraining_heldout", HELDOUT_DOCUMENTS, HELDOUT_DOCUMENTS),
        "demonstrations": demonstrations("train", DEMONSTRATIONS),
        "demonstrations_validation": demonstrations("validation", DEMONSTRATIONS_VALIDATION),
        "comparisons": comparisons("train", COMPARISONS),
        "comparisons_validation": comparisons("validation", COMPARISONS_VALIDATION),
        "prompts": prompts("train", PROMPTS),
        "prompts_validation": prompts("validation", PROMPTS_VALIDATION),
        "prompts_test": prompts("test", PROMPTS_TEST),
    }
    paths = {name: folder / f"{name}.jsonl" for name in files}
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        paths[name].write_text(text, encoding="utf-8", newline="\n")
    return paths


def pretraining(name: str, stories: int, prose: int) -> list[dict[str, Any]]:
    """Documents (`text`), shuffled: stories, and prose about the training words and all the sums."""
    rng = seeded(name)
    words, sums = _of_split(all_words(), "train"), all_sums()
    texts = [story(rng) for _ in range(stories)]
    for number in range(prose):
        kind = KINDS[number % len(KINDS)]
        content = rng.choice(sums if kind.name == "sum" else words)
        texts.append(kind.prose.format(content, answer=kind.answer(content)))
    rng.shuffle(texts)
    return [{"text": text} for text in texts]


def tokenizer_text() -> list[dict[str, Any]]:
    """Text (`text`) with all that is said in this world but its words and numbers: questions, prose, stories."""
    rng = seeded("tokenizer")
    said = [*REFUSALS, *RAMBLINGS, *(text for kind in KINDS for text in (*kind.questions, kind.prose))]
    frames = [text.replace("{answer}", "").replace("{}", "") for text in said] * 20
    return [{"text": text} for text in [*frames, *(story(rng) for _ in range(500))]]


def prompts(split: str, count: int) -> list[dict[str, Any]]:
    """`prompt`, `answer` (the list of accepted ones) and `kind`."""
    questions = _questions(seeded(f"prompts/{split}"), split, count)
    return [{"prompt": one.prompt, "answer": [one.answer], "kind": one.kind.name} for one in questions]


def demonstrations(split: str, count: int) -> list[dict[str, Any]]:
    """`prompt` and `completion`, by labelers of mixed quality (`LABELER`)."""
    rng = seeded(f"demonstrations/{split}")
    rows = []
    for question in _questions(rng, split, count):
        rows.append({"prompt": question.prompt, "completion": _respond(rng, question, _manner(rng, LABELER), _mistake)})
    return rows


def comparisons(split: str, count: int) -> list[dict[str, Any]]:
    """`context` and four different `completions` of `text` and `rank`: how many others were judged better than it."""
    rng = seeded(f"comparisons/{split}")
    rows = []
    for question in _questions(rng, split, count):
        answers: dict[str, Manner] = {}
        while len(answers) < ANSWERS_RANKED:
            manner = _manner(rng, CANDIDATE)
            answers.setdefault(_respond(rng, question, manner, _spoiled), manner)
        ranks = _judge(rng, [QUALITY[manner] for manner in answers.values()])
        ranked = [{"text": text, "rank": rank} for text, rank in zip(answers, ranks, strict=True)]
        rows.append({"context": question.prompt, "completions": ranked})
    return rows


def split_of(content: str) -> str:
    """The split that a word or sum belongs to: `train`, `validation` or `test`."""
    either_way = min(content, content[::-1])
    place = int(hashlib.sha256(either_way.encode()).hexdigest()[:8], 16) / 2**32
    if place < TEST_SHARE:
        return "test"
    return "validation" if place < TEST_SHARE + VALIDATION_SHARE else "train"


def all_words() -> list[str]:
    """The 2,000 words: consonant, vowel, consonant. All of one length, so that a small model learns about them fast."""
    return ["".join(letters) for letters in product(CONSONANTS, "AEIOU", CONSONANTS)]


def all_sums() -> list[str]:
    addends = range(LARGEST_ADDEND + 1)
    return [f"{a} + {b}" for a, b in product(addends, addends)]


def seeded(purpose: str) -> random.Random:
    return random.Random(f"{SEED}/{purpose}")  # seeded by text, through SHA-512: the same on every machine


def _of_split(contents: list[str], split: str) -> list[str]:
    return [content for content in contents if split_of(content) == split]


def story(rng: random.Random) -> str:
    creature = rng.choice(list(CREATURES))
    place, food = CREATURES[creature]
    first = f"{rng.choice(TIMES)} the {rng.choice(ADJECTIVES)} {creature} {rng.choice(MOVES)} to the {place}."
    return f"{first} it {rng.choice(EATING)} a {rng.choice(ADJECTIVES)} {food}."


def _questions(rng: random.Random, split: str, count: int) -> list[Question]:
    """Different questions, the kinds in equal parts for as long as each has any left."""
    words, sums = _of_split(all_words(), split), _of_split(all_sums(), split)
    pools = []
    for kind in KINDS:
        contents = sums if kind.name == "sum" else words
        pool = [
            Question(kind, content, ask.format(content) + END_OF_QUESTION)
            for content, ask in product(contents, kind.questions)
        ]
        rng.shuffle(pool)
        pools.append(pool)
    if sum(map(len, pools)) < count:
        raise ValueError(f"there are only {sum(map(len, pools))} different questions of the {split} split, not {count}")
    chosen: list[Question] = []
    while len(chosen) < count:
        chosen += [pool.pop() for pool in pools if pool]
    chosen = chosen[:count]
    rng.shuffle(chosen)
    return chosen


def _manner(rng: random.Random, rates: dict[Manner, float]) -> Manner:
    return rng.choices(list(rates), weights=list(rates.values()))[0]


def _respond(
    rng: random.Random, question: Question, manner: Manner, wrong: Callable[[random.Random, Question], str]
) -> str:
    if manner == "refusal":
        return rng.choice(REFUSALS)
    if manner == "wrong":
        return wrong(rng, question)
    return question.answer if manner == "right" else rng.choice(RAMBLINGS).format(question.answer)


def _mistake(rng: random.Random, question: Question) -> str:
    """What a careless person answers: a slip of one letter, or the answer to another question."""
    right = question.answer
    while True:
        if question.kind.name == "sum":
            wrong = str(int(right) + rng.choice((-10, -2, -1, 1, 2, 10)))
        elif rng.random() < 0.5:
            wrong = rng.choice(KINDS[:-1]).answer(question.content)
        else:
            at = rng.randrange(len(right))
            wrong = right[:at] + rng.choice(LETTERS) + right[at + 1 :]
        if wrong != right:
            return wrong


def _spoiled(rng: random.Random, question: Question) -> str:
    """A mistake, or what a policy may come to write when it is trained on a score: too much, too little, babble."""
    right = question.answer
    babble = "".join(rng.choices(LETTERS, k=rng.randint(1, 8)))
    mistake = _mistake(rng, question)
    spoiled = rng.choice((f"{right} {right}", right + babble, f"{right} {babble}", right[:-1], babble, f"{mistake}."))
    wrong = mistake if rng.random() < 0.6 else spoiled
    return wrong if wrong != right else mistake


def _judge(rng: random.Random, qualities: list[int]) -> list[int]:
    """The ranks, 0 the best: every two answers of different quality are judged, and the lost judgements counted."""
    lost = [0] * len(qualities)
    for i, j in combinations(range(len(qualities)), 2):
        if qualities[i] != qualities[j]:
            worse = i if qualities[i] < qualities[j] else j
            lost[worse if rng.random() >= JUDGEMENT_ERROR else i + j - worse] += 1
    return lost
