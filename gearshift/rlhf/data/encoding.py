"""From text to tokens: prompts, demonstrations, comparisons and blocks of pretraining text.

Prompt and completion are tokenized apart, as they are when the policy writes: no token spans the two.
A row over its limit is left out and counted, never cut.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from gearshift.errors import UserError
from gearshift.rlhf.data.formats import (
    Keys,
    Prompt,
    plain_prompt,
    read_comparison,
    read_demonstration,
    read_document,
    read_prompt,
    require_prompt,
)
from gearshift.rlhf.data.left_out import Drop, Encoded
from gearshift.rlhf.data.sources import Record

IGNORED = -100  # a target without a loss


@dataclass(frozen=True)
class PromptRow:
    """A prompt: its place in the kept rows, its tokens (BOS included where the tokenizer has one), the text that
    they stand for, all fields of the row that it came from, and `file:line`."""

    id: int
    tokens: list[int]
    text: str
    extra: dict[str, Any]
    origin: str = ""


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the answer to imitate, EOS included."""

    prompt: list[int]
    completion: list[int]

    def shifted(self) -> tuple[list[int], list[int]]:
        """The whole sequence, and what each position is to predict: the completion alone bears a loss."""
        tokens = self.prompt + self.completion
        return tokens, [IGNORED] * (len(self.prompt) - 1) + self.completion + [IGNORED]


@dataclass(frozen=True)
class Block:
    """Up to max_tokens + 1 tokens of text: each but the last is an input, each but the first is to be predicted.

    The last token is also the first of the next block, so every token of the text is predicted once.
    """

    tokens: array[int]

    def shifted(self) -> tuple[list[int], list[int]]:
        tokens = self.tokens.tolist()
        return tokens[:-1], tokens[1:]


@dataclass(frozen=True)
class Comparison:
    """A prompt and its answers, EOS included; the lower the rank the better, equal ranks are ties.

    `margin`: see `ComparisonText`.
    """

    prompt: list[int]
    completions: list[list[int]]
    ranks: list[float]
    margin: float = 0.0


@dataclass(frozen=True)
class Encoder:
    """How text becomes tokens.

    `prompt_template` holds `{prompt}` once. With `chat_template`, prompts go through the tokenizer's own template
    instead, a text as one turn of the user. Without it a dialogue of several turns is written as in hh-rlhf.
    `max_prompt_tokens` bounds a prompt, `max_tokens` a whole sequence; None is no bound. `on_bad_row`: a row that
    cannot be read raises UserError ("error"), or is left out and counted ("skip").
    """

    tokenizer: PreTrainedTokenizerFast
    keys: Keys = field(default_factory=Keys)
    prompt_template: str = "{prompt}"
    chat_template: bool = False
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    on_bad_row: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if self.prompt_template.count("{prompt}") != 1:
            raise UserError(f"data.prompt_template: must hold {{prompt}} once, it is {self.prompt_template!r}")
        if self.tokenizer.eos_token_id is None:
            raise UserError("data.tokenizer: the tokenizer has no EOS token, so no response could ever end")
        if self.chat_template and not self.tokenizer.chat_template:
            raise UserError("data.chat_template: is on, but the tokenizer has no chat template; turn it off")

    @property
    def eos(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def prompts(self, records: Sequence[Record]) -> Encoded[PromptRow]:
        """Prompts for rollouts, of at most `max_prompt_tokens`."""
        drop = Drop(len(records), self.on_bad_row == "skip")
        kept: list[PromptRow] = []
        for row in self._read(records, lambda record: _Read(record, read_prompt(record, self.keys)), drop):
            if not self._long_prompt(drop, row):
                kept.append(PromptRow(len(kept), row.tokens, row.text, row.record.fields, row.origin))
        return drop.encoded(kept)

    def with_prefix(self, prompt: PromptRow, prefix: str) -> PromptRow:
        """The prompt after `prefix` (a few-shot text), BOS still first."""
        if not prefix:
            return prompt
        bos = self._bos() if not self.chat_template else []
        tokens = [*bos, *self._encode([prefix])[0], *prompt.tokens[len(bos) :]]
        return dataclasses.replace(prompt, tokens=tokens, text=prefix + prompt.text)

    def demonstrations(self, records: Sequence[Record]) -> Encoded[Demonstration]:
        """Prompts with an answer; the prompt and the whole sequence within their limits."""

        def read(record: Record) -> _Read:
            found = read_demonstration(record, self.keys)
            return _Read(record, found.prompt, [found.completion])

        drop = Drop(len(records), self.on_bad_row == "skip")
        kept = []
        for row in self._read(records, read, drop):
            if not self._long_prompt(drop, row) and not self._long_sequence(drop, row):
                kept.append(Demonstration(row.tokens, row.answers[0]))
        return drop.encoded(kept)

    def comparisons(self, records: Sequence[Record]) -> Encoded[Comparison]:
        """Prompts with ranked answers; a row is left out if one answer is over the limit, or if it has no pair.

        Answers that are the same, token for token, are one, at their mean rank.
        """

        def read(record: Record) -> _Read:
            found = read_comparison(record, self.keys)
            return _Read(record, found.prompt, found.completions, found.ranks, found.margin)

        drop = Drop(len(records), self.on_bad_row == "skip")
        kept = []
        for row in self._read(records, read, drop):
            if self._long_prompt(drop, row) or self._long_sequence(drop, row):
                continue
            comparison = merged(Comparison(row.tokens, row.answers, row.ranks, row.margin))
            if not has_pair(comparison):
                drop.because("without two different answers of different rank", row.origin)
                continue
            kept.append(comparison)
        return drop.encoded(kept)

    def blocks(self, records: Sequence[Record]) -> Encoded[Block]:
        """Pretraining text: the documents, each ended by EOS, one after another, cut every `max_tokens`.

        `read` and `rows` count different things here: documents, and blocks.
        """
        if self.max_tokens is None:
            raise UserError("data.max_tokens: must be set for pretraining text, which is cut in blocks of that size")
        stream: array[int] = array("i")
        bos, drop, texts = self._bos(), Drop(len(records), self.on_bad_row == "skip"), []
        for record in records:
            with drop.broken():
                texts.append(read_document(record, self.keys))
        for tokens in self._encode(texts):
            stream.extend([*bos, *tokens, self.eos])
        cuts = range(0, len(stream) - 1, self.max_tokens)
        return drop.encoded([Block(stream[at : at + self.max_tokens + 1]) for at in cuts])

    def _render(self, prompt: Prompt) -> str:
        if self.chat_template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return str(text)
        return plain_prompt(prompt, self.prompt_template)

    def _bos(self) -> list[int]:
        """BOS where the tokenizer itself would put one; a chat template writes its own."""
        bos = self.tokenizer.bos_token_id
        return [int(bos)] if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else []

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens without any special one added; truncation is off whatever the tokenizer's file says."""
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, padding=False, truncation=False, verbose=False)
        return list(encoded["input_ids"])

    def _read(self, records: Sequence[Record], read: Callable[[Record], _Read], drop: Drop) -> Iterator[_Read]:
        """The rows that can be used, text and tokens filled in; what else there is goes to `drop`."""
        rows = []
        for record in records:
            with drop.broken():
                row = read(record)
                row.text = self._render(row.prompt)
                require_prompt(row.origin, row.text)
                rows.append(row)
        bos = [] if self.chat_template else self._bos()
        answers = iter(self._encode_completions([answer for row in rows for answer in row.completions]))
        for row, tokens in zip(rows, self._encode([row.text for row in rows]), strict=True):
            row.tokens, row.answers = bos + tokens, [next(answers) for _ in row.completions]
            with drop.broken():
                require_prompt(row.origin, row.tokens)  # a tokenizer may drop all of a text, such as spaces
                yield row

    def _encode_completions(self, texts: list[str]) -> list[list[int]]:
        return [tokens if tokens[-1:] == [self.eos] else [*tokens, self.eos] for tokens in self._encode(texts)]

    def _long_prompt(self, drop: Drop, row: _Read) -> bool:
        limit = self.max_prompt_tokens
        too_long = limit is not None and len(row.tokens) > limit
        return too_long and drop.because(f"over data.max_prompt_tokens={limit}", row.origin)

    def _long_sequence(self, drop: Drop, row: _Read) -> bool:
        limit = self.max_tokens
        too_long = limit is not None and len(row.tokens) + max(map(len, row.answers)) > limit
        return too_long and drop.because(f"over data.max_tokens={limit}", row.origin)


@dataclass
class _Read:
    """What one record holds; `text`, `tokens` of the prompt and of the `answers` come when it is encoded."""

    record: Record
    prompt: Prompt
    completions: list[str] = field(default_factory=list)
    ranks: list[float] = field(default_factory=list)
    margin: float = 0.0
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)

    @property
    def origin(self) -> str:
        return self.record.origin


def merged(row: Comparison) -> Comparison:
    """Each different answer once, at the mean rank of its copies: no pair compares an answer with itself."""
    ranks: dict[tuple[int, ...], list[float]] = {}
    for completion, rank in zip(row.completions, row.ranks, strict=True):
        ranks.setdefault(tuple(completion), []).append(rank)
    means = [sum(own) / len(own) for own in ranks.values()]
    return dataclasses.replace(row, completions=[list(answer) for answer in ranks], ranks=means)


def split_in_pairs(row: Comparison) -> list[Comparison]:
    """Every pair of answers of different rank as a comparison of its own, the better one first."""
    every = range(len(row.ranks))
    return [
        Comparison(row.prompt, [row.completions[i], row.completions[j]], [0.0, 1.0], row.margin)
        for i in every
        for j in every
        if row.ranks[i] < row.ranks[j]
    ]


def has_pair(row: Comparison) -> bool:
    """Whether two answers have different ranks: without, there is nothing to learn. Its answers are all different."""
    return len(set(row.ranks)) > 1
