"""What a config names: model folders, tokenizers and data files. Only their small files and headers are read.

A name is a path when it exists, or when it looks like one (./x, runs/x where runs/ is a folder here, x.jsonl);
`owner/name` is otherwise left to the hub, which answers when the processes load it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gearshift.engine.folder import config_number, read_object, weight_files
from gearshift.errors import UserError
from gearshift.rlhf.data.vocabulary import has_tokenizer, read_vocabulary, rows_needed, too_small

DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")

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
        architectures = read_object(folder / "config.json").get("architectures") or []
    except UserError as error:
        return str(error)
    heads = [a for a in architectures if a.endswith("ForSequenceClassification")]
    if classifier is True and architectures and not heads:
        return f"{name} is a {architectures[0]}, not a reward model (a sequence-classification folder)"
    if classifier is False and heads:
        return f"{name} is a {heads[0]}, which cannot write text: use a causal language model"
    try:
        weight_files(folder)
    except UserError as error:
        return str(error)
    return None


def model_config(name: str) -> dict[str, Any] | None:
    """A folder's config.json; None where there is none to read here (a hub name). Raises UserError."""
    path = Path(name) / "config.json"
    return read_object(path) if path.is_file() else None


def tokenizer_problem(name: str) -> str | None:
    """Why `name` cannot be loaded as a tokenizer, or None."""
    if is_hub_name(name):
        return None
    if not Path(name).is_dir():
        return f"there is no tokenizer folder {name} (relative to {Path.cwd()}), and it is not a hub name (owner/name)"
    if not has_tokenizer(Path(name)):
        return f"{name} has no tokenizer (tokenizer.json): save one there or set data.tokenizer"
    return vocabulary_problem(name)


def vocabulary_problem(name: str) -> str | None:
    """Why a folder's tokenizer.json cannot be read, or None (also where there is none)."""
    try:
        read_vocabulary(Path(name))
    except UserError as error:
        return str(error)
    return None


def has_chat_template(name: str) -> bool | None:
    """Whether a tokenizer folder has a chat template; None where that cannot be seen here (a hub name)."""
    folder = Path(name)
    if not folder.is_dir():
        return None
    if (folder / "chat_template.jinja").is_file() or (folder / "additional_chat_templates").is_dir():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(read_object(config).get("chat_template"))


def room_problem(model: str, tokenizer: str) -> str | None:
    """Why a model's embedding is too small for a tokenizer, or None (also where that cannot be seen here)."""
    vocabulary = read_vocabulary(Path(tokenizer))
    rows = config_number(model_config(model) or {}, "vocab_size")
    if vocabulary is None or rows is None or rows >= rows_needed(vocabulary):
        return None
    return f"{model}: {too_small(rows, rows_needed(vocabulary))}"


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
    """Whether two folders' tokenizers give the same ids to the same tokens.

    None unless both have a tokenizer.json: the ranks load and compare whatever else is there.
    """
    if Path(one) == Path(other):
        return True
    a, b = read_vocabulary(Path(one)), read_vocabulary(Path(other))
    return None if a is None or b is None else a == b
