"""What a config names: model folders, tokenizers and data files. Only their small files are read.

A name is a path when it exists, or when it looks like one (./x, runs/x where runs/ is a folder here, x.jsonl);
`owner/name` is otherwise left to the hub, which answers when the processes load it.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


HUB_MODEL = re.compile(r"[\w-][\w.-]*/[\w.-]+")
HUB_DATA = re.compile(r"[\w-][\w.-]*/[\w.-]+(/[\w.-]+)?(:[\w.+\[\]:%-]+)?")  # owner/name/configuration:split


def is_hub_name(name: str, form: re.Pattern[str] = HUB_MODEL) -> bool:
    """Whether `name` is `owner/name` and nothing here suggests that a path was meant."""
    if Path(name).exists() or name.endswith((*DATA_SUFFIXES, ".json", ".csv")) or not form.fullmatch(name):
        return False
    return not Path(name.split("/")[0]).is_dir()


def model_problem(name: str, classifier: bool | None = None) -> str | None:
    """Why `name` cannot be loaded as a model, or None. `classifier`: it must, or must not, have a score head."""
    if is_hub_name(name):
        return None
    folder = Path(name)
    if not folder.is_dir():
        return f"there is no model folder {name} (relative to {Path.cwd()}), and it is not a hub name (owner/name)"
    if not (folder / "config.json").is_file():
        inner = next((f for f in ("model", "final") if (folder / f / "config.json").is_file()), None)
        return f"{name} has no config.json" + (f": did you mean {name.rstrip('/')}/{inner}?" if inner else "")
    try:
        architectures = model_config(name)["architectures"] or []  # type: ignore[index]
    except ValueError as error:
        return f"{name}/config.json is not JSON: {error}"
    except KeyError:
        return None
    heads = [a for a in architectures if a.endswith("ForSequenceClassification")]
    if classifier is True and architectures and not heads:
        return f"{name} is a {architectures[0]}, not a reward model (a sequence-classification folder)"
    if classifier is False and heads:
        return f"{name} is a {heads[0]}, which cannot write text: use a causal language model"
    return None


def model_config(name: str) -> dict[str, Any] | None:
    """A folder's config.json; None where there is none to read here (a hub name). ValueError: not JSON."""
    path = Path(name) / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def tokenizer_problem(name: str) -> str | None:
    """Why `name` cannot be loaded as a tokenizer, or None."""
    if is_hub_name(name):
        return None
    if not Path(name).is_dir():
        return f"there is no tokenizer folder {name} (relative to {Path.cwd()}), and it is not a hub name (owner/name)"
    if not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
        return f"{name} has no tokenizer (tokenizer.json): save one there or set data.tokenizer"
    return None


def source_problem(source: str) -> str | None:
    """Why a data source cannot be read, or None."""
    path = Path(source).expanduser()
    if path.is_dir():
        return f"{source} is a folder: name its files"
    if path.is_file():
        if not source.endswith(DATA_SUFFIXES):
            return f"{source} is none of {', '.join(DATA_SUFFIXES)}"
        return f"{source} is empty" if path.stat().st_size == 0 else None
    if is_hub_name(source, HUB_DATA):
        return None
    return f"there is no file {source} (relative to {Path.cwd()}), and it is not a hub name (owner/name)"


def same_vocabulary(one: str, other: str) -> bool | None:
    """Whether two folders' tokenizers give the same ids to the same tokens; None where that cannot be seen here."""
    if Path(one) == Path(other):
        return True
    for read in (_vocabulary, *(lambda f, n=n: _bytes(f, n) for n in ("tokenizer.model", "vocab.json", "vocab.txt"))):
        a, b = read(Path(one)), read(Path(other))
        if a is not None and b is not None:
            return a == b
    return None


def _vocabulary(folder: Path) -> str | None:
    """Hash of every (token, id) of a tokenizer.json, added tokens included."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab = content.get("model", {}).get("vocab", {})
    # BPE and WordPiece: token -> id. Unigram: [token, score] in the order of ids.
    tokens = dict(vocab) if isinstance(vocab, dict) else {entry[0]: number for number, entry in enumerate(vocab)}
    tokens.update({token["content"]: token["id"] for token in content.get("added_tokens", [])})
    return hashlib.sha256(json.dumps(sorted(tokens.items())).encode()).hexdigest()


def _bytes(folder: Path, name: str) -> str | None:
    path = folder / name
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
