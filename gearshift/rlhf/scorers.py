"""Scores of responses whose right answer is known, for `compare`: `module:function`, `(row, response) -> float`."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any

from gearshift.errors import UserError

FINAL_ANSWER = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)")  # how GSM8K ends a solution


def gsm8k(row: dict[str, Any], response: str) -> float:
    """1 if the number after the response's first `####` equals the one in `row["answer"]`, else 0.

    `answer` is a number as text, a list of accepted ones, or a GSM8K solution. Raises UserError if it holds no number.
    """
    accepted = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    right = [final_number(text) if "####" in text else to_number(text) for text in map(str, accepted)]
    if None in right:
        raise UserError(f"the answer {row['answer']!r} is neither a number nor a solution that ends in '#### number'")
    return float(final_number(response) in right)


def final_number(solution: str) -> Decimal | None:
    """The number after the first `####`: 1,234.50 and 1234.5 are the same; None if there is none."""
    match = FINAL_ANSWER.search(solution)
    return to_number(match[1]) if match else None


def to_number(text: str) -> Decimal | None:
    """`text` as an exact number, commas ignored; None if it is none."""
    try:
        number = Decimal(text.replace(",", "").strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
