"""Where rows come from: local files, or a data set on the Hugging Face hub.

Every row keeps its origin (`file:line`), so that an error further on can say where to look.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gearshift.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
# owner/name, optionally /configuration, optionally :split
HUB_NAME = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(?:/(?P<configuration>[\w.-]+))?(?::(?P<split>[\w.+\[\]:%-]+))?")
OTHER_FILES = (
    ".json",
    ".csv",
    ".tsv",
    ".gz",
    ".zip",
    ".zst",
    ".arrow",
    ".md",
)  # surely files, though not readable here


@dataclass(frozen=True)
class Record:
    """One row as it was read, and where it stood (`file:line`, lines counted from 1).

    `row`: its fields by name, or why it cannot be read. That is raised only where the fields are wanted, so that who
    reads the rows decides what a broken one means.
    """

    row: dict[str, Any] | UserError
    origin: str

    @property
    def fields(self) -> dict[str, Any]:
        """Raises UserError for a row that could not be read."""
        if isinstance(self.row, UserError):
            raise self.row
        return self.row


def read_sources(sources: Sequence[str]) -> list[Record]:
    """The rows of all the sources, in order.

    A source is a path ending in .jsonl, .jsonl.gz, .parquet or .txt (the whole file is one row with a `text` field),
    or a hub name: `owner/name`, `owner/name:split`, `owner/name/configuration:split` (split `train` if not said).

    Raises UserError for a source that is missing, empty or cannot be read at all (a torn gzip or parquet file). A row
    that cannot be parsed raises it when its fields are read.
    """
    if isinstance(sources, str):
        raise UserError(f"data sources must be a list, not the one text {sources!r}")
    if not sources:
        raise UserError("no data source is given; name at least one file or hub data set")
    return [record for source in sources for record in read_source(source)]


def read_source(source: str) -> list[Record]:
    """The rows of one source; see `read_sources`."""
    return list(rows_of(source))


def rows_of(source: str) -> Iterator[Record]:
    """The rows of one source, read as they are asked for; see `read_sources`."""
    empty = True
    for record in _read_file(Path(source).expanduser()) if is_local(source) else _read_hub(source):
        empty = False
        yield record
    if empty:
        raise UserError(f"{source}: the data set is empty")


def is_local(source: str) -> bool:
    """Whether the source is a file here (or was meant to be one), not a name on the hub."""
    looks_like_path = source.endswith(SUFFIXES + OTHER_FILES) or source.startswith(("/", "./", "../", "~"))
    return looks_like_path or Path(source).exists() or not HUB_NAME.fullmatch(source)


def _read_file(path: Path) -> Iterator[Record]:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the files in it")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.name.endswith(".jsonl"):
            with open(path, "rb") as lines:
                yield from _read_jsonl(lines, path)
        elif path.name.endswith(".jsonl.gz"):
            with gzip.open(path, "rb") as lines:
                yield from _read_jsonl(lines, path)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path)
        elif path.suffix == ".txt":
            yield from _read_text(path)
        else:
            raise UserError(f"{path}: cannot tell the format; the name must end in {', '.join(SUFFIXES)}")
    except (OSError, EOFError, zlib.error) as error:  # unreadable, or not really (or not wholly) gzip
        raise UserError(f"{path}: cannot be read: {error}") from error


def _read_jsonl(lines: IO[bytes] | gzip.GzipFile, path: Path) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        yield Record(_parsed(line, origin), origin)


def _parsed(line: bytes, origin: str) -> dict[str, Any] | UserError:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return UserError(f"{origin}: is not UTF-8 text: {error.reason} at byte {error.start}")
    except json.JSONDecodeError as error:
        return UserError(f"{origin}: is not valid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
        return UserError(f"{origin}: is JSON that cannot be read: {error}")
    if not isinstance(row, dict):
        return UserError(f"{origin}: a row must be a JSON object, this is a {type(row).__name__}")
    return row


def _read_text(path: Path) -> Iterator[Record]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if text.strip():
        yield Record({"text": text}, f"{path}:1")


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading parquet needs pyarrow (pip install pyarrow)") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield Record(row, f"{path}:{number}")
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: is not valid parquet: {str(error).splitlines()[0]}") from error


def _read_hub(source: str) -> Iterator[Record]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source}: is no local file, and hub names need datasets (pip install datasets)") from error
    match = HUB_NAME.fullmatch(source)
    assert match is not None  # `is_local` sends nothing else here
    split = match["split"] or "train"
    try:
        rows = datasets.load_dataset(match["path"], match["configuration"], split=split)
    except Exception as error:  # the hub client raises dozens of types: no network, no such name, no such split
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{source}: neither a local file nor a readable hub data set: {reason[0]}") from error
    for number, row in enumerate(rows, start=1):
        yield Record(dict(row), f"{source}:{number}")
