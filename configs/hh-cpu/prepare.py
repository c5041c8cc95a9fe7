"""Splits the dialogues of hh-rlhf into training and held-out pairs.

    python configs/hh-cpu/prepare.py DATA_FOLDER OUT_FOLDER

DATA_FOLDER holds hh-rlhf/harmless-base-test.jsonl.gz (github.com/anthropics/hh-rlhf). A dialogue is held out by the
hash of its first question, so that no question is on both sides. The rows stay as they are: `chosen` and `rejected`,
two whole dialogues; Gearshift finds the prompt that they share.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from gearshift.errors import UserError
from gearshift.rlhf.data.sources import read_source

HELD_OUT_SHARE = 0.25


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: prepare.py DATA_FOLDER OUT_FOLDER", file=sys.stderr)
        return 2
    source = Path(arguments[0]) / "hh-rlhf/harmless-base-test.jsonl.gz"
    try:
        rows = [record.fields for record in read_source(str(source))]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = Path(arguments[1])
    out.mkdir(parents=True, exist_ok=True)
    for name, is_held_out in (("pairs", False), ("pairs_validation", True)):
        own = [row for row in rows if held_out(row) == is_held_out]
        path = out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8", newline="\n")
        print(f"{path}: {len(own):,} rows")
    return 0


def held_out(row: dict[str, Any]) -> bool:
    """Whether the hash of the dialogue's first question is below the share."""
    question = row["chosen"].split("\n\nAssistant:")[0].strip()
    return int(hashlib.sha256(question.encode()).hexdigest()[:8], 16) / 2**32 < HELD_OUT_SHARE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
