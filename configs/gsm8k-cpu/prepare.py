"""Turns GSM8K and Tiny Shakespeare into Gearshift's formats.

    python configs/gsm8k-cpu/prepare.py DATA_FOLDER OUT_FOLDER

DATA_FOLDER holds gsm8k/{train,test,model_solutions}.jsonl (github.com/openai/grade-school-math) and
shakespeare/tinyshakespeare.txt (github.com/karpathy/char-rnn). What is written, as JSON lines:

| file | rows |
|---|---|
| pretraining, pretraining_heldout | Shakespeare, and the solutions of the training questions without their questions |
| demonstrations, demonstrations_validation | `prompt`, `completion`; 5% of the training questions are validation |
| comparisons, comparisons_validation | `context`, `completions`: models' solutions, a correct one beats a wrong one |
| prompts, prompts_validation | the training questions, split like the demonstrations, with `answer` |
| flan, flan_validation; t0, t0_validation | `inputs`, `targets`: the training rows as tasks with short answers |
| prompts_test | test questions of which no solution was ranked, with `answer` |

The comparisons are about test questions (there are no others), so these are split by their hash: 60% train the reward
model, 20% validate it, 20% are the prompts of the final comparison. Scorer: `gearshift.rlhf.scorers:gsm8k`.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gearshift.errors import UserError
from gearshift.rlhf.data.sources import read_source
from gearshift.rlhf.scorers import final_number

# The baselines on public tasks: the same rows, never as a question that is to be worked out. `{question}` and
# `{solution}` are the row's, `{said}` is a number that is right every other time. A number as target is written as
# GSM8K ends a solution, so that the scorer can read it. FLAN spells options out (Wei et al. 2021); T0's templates are
# worded each in its own way (Sanh et al. 2021).
TASKS: dict[str, dict[str, tuple[str, ...]]] = {
    "flan": {
        "number": ("{question} The final number is:", "Give the number only. {question}"),
        "judge": (
            "{question} Is it {said}? OPTIONS: yes, no",
            "Q: {question} A: {said}. Is the answer correct? OPTIONS: yes, no",
        ),
        "steps": ("{question} How many lines does the solution have?", "Count the steps that this takes: {question}"),
    },
    "t0": {
        "number": ("Someone asks: {question} What number do you tell them?", "{question} I need just the result."),
        "question": ("{solution} What was the question?", "Write a problem that this solves: {solution}"),
        "judge": (
            "My friend read this: {question} Her answer is {said}. Is she right, yes or no?",
            "{question} Yes or no, is that {said}?",
        ),
    },
}
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
VALIDATION_SHARE = 0.05  # of the training questions
REWARD_SHARE, REWARD_VALIDATION_SHARE = 0.60, 0.20  # of the test questions; the rest is for the comparison
HELDOUT_SHARE = 0.02  # of Shakespeare, its end
CHARACTERS_PER_DOCUMENT = 2_000  # Shakespeare is cut at the first empty line after so many

Row = dict[str, Any]


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: prepare.py DATA_FOLDER OUT_FOLDER", file=sys.stderr)
        return 2
    try:
        written = prepare(Path(arguments[0]), Path(arguments[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path, rows in written.items():
        print(f"{path}: {rows:,} rows")
    return 0


def prepare(data: Path, out: Path) -> dict[Path, int]:
    """Writes every file (see the module); returns the number of rows of each."""
    train = _rows(data / "gsm8k/train.jsonl", ("question", "answer"))
    test = _rows(data / "gsm8k/test.jsonl", ("question", "answer"))
    ranked = _rows(data / "gsm8k/model_solutions.jsonl", ("question", *MODELS))
    plays = _rows(data / "shakespeare/tinyshakespeare.txt", ("text",))[0]["text"]
    kept = [row for row in train if share(row["question"]) >= VALIDATION_SHARE]
    validation = [row for row in train if share(row["question"]) < VALIDATION_SHARE]
    heldout = round(len(plays) * (1 - HELDOUT_SHARE))
    comparisons = [row for row in map(comparison, ranked) if row]
    files: dict[str, list[Row]] = {
        "pretraining": documents(plays[:heldout]) + [{"text": row["answer"]} for row in kept],
        "pretraining_heldout": documents(plays[heldout:]) + [{"text": row["answer"]} for row in validation],
        "demonstrations": [demonstration(row) for row in kept],
        "demonstrations_validation": [demonstration(row) for row in validation],
        "comparisons": [row for row in comparisons if part(row["context"]) == "reward"],
        "comparisons_validation": [row for row in comparisons if part(row["context"]) == "reward validation"],
        "prompts": [prompt(row) for row in kept],
        "prompts_validation": [prompt(row) for row in validation],
        "prompts_test": [prompt(row) for row in test if part(row["question"]) == "comparison"],
    }
    for mixture in TASKS:
        files[mixture] = [task(mixture, number, row) for number, row in enumerate(kept)]
        files[f"{mixture}_validation"] = [task(mixture, number, row) for number, row in enumerate(validation)]
    out.mkdir(parents=True, exist_ok=True)
    return {_write(out / f"{name}.jsonl", rows): len(rows) for name, rows in files.items()}


def share(question: str) -> float:
    """Where in [0, 1) the question's hash falls: the same for the same text, whatever file it stands in."""
    words = " ".join(question.split())
    return int(hashlib.sha256(words.encode()).hexdigest()[:8], 16) / 2**32


def part(question: str) -> str:
    """What a test question is for: `reward`, `reward validation` or `comparison`."""
    place = share(question)
    if place < REWARD_SHARE:
        return "reward"
    return "reward validation" if place < REWARD_SHARE + REWARD_VALIDATION_SHARE else "comparison"


def demonstration(row: Row) -> Row:
    return {"prompt": row["question"], "completion": row["answer"]}


def prompt(row: Row) -> Row:
    number = final_number(row["answer"])
    if number is None:
        raise UserError(f"the solution of {row['question'][:60]!r} does not end in '#### number'")
    return {"prompt": row["question"], "answer": str(number)}


def task(mixture: str, number: int, row: Row) -> Row:
    """A training row as one of the mixture's tasks, each in turn, under one of its templates."""
    rng = random.Random(f"{mixture}/{row['question']}")  # seeded by text: the same on every machine
    name = list(TASKS[mixture])[number % len(TASKS[mixture])]
    right = prompt(row)["answer"]
    said = right if rng.random() < 0.5 else str(int(float(right)) + rng.choice((-10, -2, -1, 1, 2, 10)))
    targets = {
        "number": f"#### {right}",
        "judge": "yes" if said == right else "no",
        "steps": str(row["answer"].count("\n")),  # its last line is the number
        "question": row["question"],
    }
    template = rng.choice(TASKS[mixture][name])
    inputs = template.format(question=row["question"], solution=row["answer"], said=said)
    return {"inputs": inputs, "targets": targets[name], "task": name}


def comparison(row: Row) -> Row | None:
    """The models' solutions, the correct ones of rank 0 and the wrong ones of rank 1; None if there are not both.

    A last line `A: 18` becomes `#### 18`, as the demonstrations end.
    """
    ranks: dict[str, int] = {}
    for model in MODELS:
        body, mark, number = row[model]["solution"].rpartition("\nA:")
        ranks.setdefault(f"{body}\n#### {number.strip()}" if mark else number, int(not row[model]["is_correct"]))
    if len(set(ranks.values())) < 2:
        return None
    return {"context": row["question"], "completions": [{"text": text, "rank": rank} for text, rank in ranks.items()]}


def documents(text: str) -> list[Row]:
    """`text` cut into documents, each at an empty line; nothing is lost but the lines between them."""
    cut: list[Row] = []
    while text:
        end = text.find("\n\n", CHARACTERS_PER_DOCUMENT)
        end = len(text) if end < 0 else end
        cut.append({"text": text[:end]})
        text = text[end + 2 :]
    return cut


def _rows(path: Path, fields: tuple[str, ...]) -> list[Row]:
    records = read_source(str(path))
    for record in records:
        missing = [name for name in fields if name not in record.fields]
        if missing:
            raise UserError(f"{record.origin}: no field '{missing[0]}'; the row has: {', '.join(record.fields)}")
    return [record.fields for record in records]


def _write(path: Path, rows: Iterable[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
