"""A tokenizer's vocabulary as its files have it. Configs are checked with it before `transformers` is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gearshift.engine.folder import read_object
from gearshift.errors import UserError

# One of them is in every folder that a tokenizer can be loaded from.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in TOKENIZER_FILES)


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Token -> id of a folder's tokenizer.json, added tokens included; None where there is none.

    Raises UserError naming the file when it is broken.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    content = read_object(path)
    try:
        return _tokens(content) | _added_on_loading(folder / "tokenizer_config.json")
    except (TypeError, KeyError, AttributeError, IndexError, ValueError):
        raise UserError(f"{path}: is not a tokenizer that this version knows") from None


def _tokens(content: dict[str, Any]) -> dict[str, int]:
    vocabulary = content["model"]["vocab"]
    # BPE and WordPiece: token -> id. Unigram: [token, score] in the order of ids.
    if isinstance(vocabulary, dict):
        tokens = dict(vocabulary)
    else:
        tokens = {entry[0]: number for number, entry in enumerate(vocabulary)}
    return tokens | {token["content"]: token["id"] for token in content.get("added_tokens") or []}


def _added_on_loading(path: Path) -> dict[str, int]:
    added = read_object(path).get("added_tokens_decoder") if path.is_file() else None
    return {token["content"]: int(number) for number, token in (added or {}).items()}


def rows_needed(vocabulary: Mapping[str, int]) -> int:
    """Rows that a model's embedding must have: one more than the largest token id."""
    return max(vocabulary.values(), default=-1) + 1


def too_small(rows: int, needed: int) -> str:
    """What to tell of a model with fewer rows than its tokenizer has ids."""
    return (
        f"its config.json has vocab_size {rows}, but the tokenizer has {needed} token ids: "
        "use the tokenizer that it was trained with, or enlarge its embedding"
    )
