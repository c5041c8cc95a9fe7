"""From text to tokens: prompts, demonstrations, comparisons and blocks of pretraining text.

Prompt and completion are tokenized apart, as they are when the policy writes: no token spans the two.
A row over its limit is left out and counted, never cut.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

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
from gearshift.rlhf.data.sources import Record

IGNORED = -100  # a target without a loss
Row = TypeVar("Row")


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
    """A prompt and its answers, EOS included; the lower the rank the better, equal ranks are ties."""

    prompt: list[int]
    completions: list[list[int]]
    ranks: list[float]


@dataclass(frozen=True)
class Encoded(Generic[Row]):
    """The rows that were kept, how many were read, and how many were left out for which reason."""

    rows: list[Row]
    read: int
    dropped: dict[str, int]

    def describe(self) -> str:
        """One line for the log: '5,843 of 6,000 rows; left out: 157 over data.max_tokens=64'."""
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        return f"{len(self.rows):,} of {self.read:,} rows" + (f"; left out: {left_out}" if left_out else "")


@dataclass(frozen=True)
class Encoder:
    """How text becomes tokens.

    `prompt_template` holds `{prompt}` once. With `chat_template`, prompts go through the tokenizer's own template
    instead, a text as one turn of the user. Without it a dialogue of several turns is written as in hh-rlhf.
    `max_prompt_tokens` bounds a prompt, `max_tokens` a whole sequence; None is no bound.
    """

    tokenizer: PreTrainedTokenizerFast
    keys: Keys = field(default_factory=Keys)
    prompt_template: str = "{prompt}"
    chat_template: bool = False
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None

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
        texts = [self._render(read_prompt(record, self.keys)) for record in records]
        drop = _Drop(records)
        kept: list[PromptRow] = []
        for record, text, tokens in zip(records, texts, self._encode_prompts(records, texts), strict=True):
            if not self._long_prompt(drop, tokens):
                kept.append(PromptRow(len(kept), tokens, text, record.fields, record.origin))
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
        texts = [read_demonstration(record, self.keys) for record in records]
        prompts = self._encode_prompts(records, [self._render(text.prompt) for text in texts])
        completions = self._encode_completions([text.completion for text in texts])
        drop = _Drop(records)
        kept = [
            Demonstration(prompt, completion)
            for prompt, completion in zip(prompts, completions, strict=True)
            if not self._long_prompt(drop, prompt) and not self._long_sequence(drop, prompt, completion)
        ]
        return drop.encoded(kept)

    def comparisons(self, records: Sequence[Record]) -> Encoded[Comparison]:
        """Prompts with ranked answers; a row is left out if one answer is over the limit, or if it has no pair.

        Answers that are the same, token for token, are one, at their mean rank.
        """
        texts = [read_comparison(record, self.keys) for record in records]
        prompts = self._encode_prompts(records, [self._render(text.prompt) for text in texts])
        flat = iter(self._encode_completions([answer for text in texts for answer in text.completions]))
        drop = _Drop(records)
        kept = []
        for text, prompt in zip(texts, prompts, strict=True):
            row = merged(Comparison(prompt, [next(flat) for _ in text.completions], text.ranks))
            if self._long_prompt(drop, prompt) or self._long_sequence(drop, prompt, max(row.completions, key=len)):
                continue
            if not has_pair(row):
                drop.because("without two different answers of different rank")
                continue
            kept.append(row)
        return drop.encoded(kept)

    def blocks(self, records: Sequence[Record]) -> Encoded[Block]:
        """Pretraining text: the documents, each ended by EOS, one after another, cut every `max_tokens`.

        `read` and `rows` count different things here: documents, and blocks.
        """
        if self.max_tokens is None:
            raise UserError("data.max_tokens: must be set for pretraining text, which is cut in blocks of that size")
        stream: array[int] = array("i")
        bos = self._bos()
        for tokens in self._encode([read_document(record, self.keys) for record in records]):
            stream.extend([*bos, *tokens, self.eos])
        cuts = range(0, len(stream) - 1, self.max_tokens)
        return Encoded([Block(stream[at : at + self.max_tokens + 1]) for at in cuts], len(records), {})

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

    def _encode_prompts(self, records: Sequence[Record], texts: list[str]) -> list[list[int]]:
        bos = [] if self.chat_template else self._bos()
        prompts = [bos + tokens for tokens in self._encode(texts)]
        for record, text, prompt in zip(records, texts, prompts, strict=True):
            require_prompt(record.origin, text)
            require_prompt(record.origin, prompt)  # a tokenizer may drop all of a text, such as spaces
        return prompts

    def _encode_completions(self, texts: list[str]) -> list[list[int]]:
        return [tokens if tokens[-1:] == [self.eos] else [*tokens, self.eos] for tokens in self._encode(texts)]

    def _long_prompt(self, drop: _Drop, prompt: list[int]) -> bool:
        limit = self.max_prompt_tokens
        return limit is not None and len(prompt) > limit and drop.because(f"over data.max_prompt_tokens={limit}")

    def _long_sequence(self, drop: _Drop, prompt: list[int], completion: list[int]) -> bool:
        limit = self.max_tokens
        too_long = limit is not None and len(prompt) + len(completion) > limit
        return too_long and drop.because(f"over data.max_tokens={limit}")


class _Drop:
    """Counts the rows that are left out, by reason."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records, self.reasons = records, dict[str, int]()

    def because(self, reason: str) -> bool:
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        return True

    def encoded(self, kept: list[Row]) -> Encoded[Row]:
        encoded = Encoded(kept, len(self.records), self.reasons)
        if not kept:
            first = self.records[0].origin if self.records else "no source"
            raise UserError(f"no row of the data is left ({first} and on): {encoded.describe()}")
        return encoded


def merged(row: Comparison) -> Comparison:
    """Each different answer once, at the mean rank of its copies: no pair compares an answer with itself."""
    ranks: dict[tuple[int, ...], list[float]] = {}
    for completion, rank in zip(row.completions, row.ranks, strict=True):
        ranks.setdefault(tuple(completion), []).append(rank)
    return Comparison(row.prompt, [list(answer) for answer in ranks], [sum(own) / len(own) for own in ranks.values()])


def has_pair(row: Comparison) -> bool:
    """Whether two answers have different ranks: without, there is nothing to learn. Its answers are all different."""
    return len(set(row.ranks)) > 1
