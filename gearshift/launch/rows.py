"""The rows that a config names, as the stage will read them: a missing field is told before any process starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from gearshift.errors import UserError
from gearshift.rlhf.data.formats import (
    Keys,
    plain_prompt,
    read_comparison,
    read_demonstration,
    read_document,
    read_prompt,
    require_prompt,
)
from gearshift.rlhf.data.sources import Record, is_local, rows_of
from gearshift.rlhf.settings import CompareConfig, Config, DataSettings, PpoConfig, RewardConfig, SftConfig

# Rows looked at of each local file: a tenth of a second. The ranks read the rest, and stop with the same line.
ROWS = 10_000

Reader = Callable[[Record, Keys], Any]


def row_problems(config: Config) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with which row) for each source with a row that its stage cannot use. Reads no hub."""
    keys = config.data.keys
    for field, sources, read in readers(config):
        for source in filter(is_local, sources):
            try:
                records = list(islice(rows_of(source), ROWS))
                if config.data.on_bad_row == "error":
                    for record in records:
                        _check_prompt(record, read, read(record, keys), config.data)
            except UserError as error:
                yield field, str(error)


def _check_prompt(record: Record, read: Reader, row: Any, data: DataSettings) -> None:
    """A row that holds a prompt holds one that is not empty (a chat template adds text of its own)."""
    if read is not read_document and not data.chat_template:
        prompt = row if read is read_prompt else row.prompt
        require_prompt(record.origin, plain_prompt(prompt, data.prompt_template))


def readers(config: Config) -> Iterator[tuple[str, list[str], Reader]]:
    """Every field that names sources, the sources, and how the stage reads their rows."""
    main: Reader = read_document
    if isinstance(config, PpoConfig | CompareConfig):
        main = read_prompt
        yield "ptx.validation", config.ptx.validation, read_document
    elif isinstance(config, RewardConfig):
        main = read_comparison
        yield "data.demonstrations", config.data.demonstrations, read_demonstration
    elif isinstance(config, SftConfig):
        main = read_demonstration
        yield "train.pretraining", config.train.pretraining, read_document
    if isinstance(config, PpoConfig):
        yield "ptx.data", config.ptx.data, read_document
    if isinstance(config, CompareConfig):
        yield "compare.selection", config.compare.selection, read_prompt
    yield "data.train", config.data.train, main
    yield "data.validation", config.data.validation, main
    yield "data.tokenizer_text", config.data.tokenizer_text, read_document
