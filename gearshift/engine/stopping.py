"""Texts that end an answer.

A match is looked for in what the tokenizer makes of the last tokens, so it may begin and end anywhere within tokens,
and characters may be split over tokens. Which tokens could complete a match at all is found out once for the whole
vocabulary; only after one of them is anything decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gearshift.errors import UserError

# What decoders write for bytes that are no whole character.
_REPLACEMENT = "\ufffd"

# Tokens that the bytes of one character can be spread over.
_CHARACTER_TOKENS = 4


class StopStrings:
    """Ends an answer with the token that completes one of `strings` in its decoded text (special tokens included).

    Raises UserError when a string is empty. Reads the tokenizer's whole vocabulary: build it once, not per batch.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]):
        if not strings or not all(strings):
            raise UserError("rollout.stop: a stop string is empty, so every answer would end at once: leave it out")
        self.strings = tuple(strings)
        self._tokenizer = tokenizer
        # Every token of a match adds at least one byte to it.
        self._tail = max(len(text.encode()) for text in strings)
        self._may_end = torch.tensor([*map(self._could_complete, _texts(tokenizer)), False])

    def completed(self, responses: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
        """responses [B, L], rows [n], of which row i has counts[i] >= 1 tokens -> bool [n]: its last completes a match.

        True also where a match stands a few tokens before the last: a row is asked after with every token it gets.
        """
        self._may_end = self._may_end.to(responses.device)
        # Models may have more rows than their tokenizer has tokens: none of those says anything.
        last = responses[rows, counts - 1].clamp(max=len(self._may_end) - 1)
        found = self._may_end[last]
        for i in found.nonzero()[:, 0].tolist():
            end = int(counts[i])
            tail = responses[rows[i], max(0, end - self._tail - _CHARACTER_TOKENS + 1) : end].tolist()
            found[i] = self._in_text(tail)
        return found

    def _in_text(self, tokens: list[int]) -> bool:
        """Whether a match stands in the last tokens, which may begin in the middle of a character.

        Up to four beginnings are tried. One is that of a character (after the rest of one, SentencePiece's byte tokens
        would all be unreadable), and some have a token before the match (a space in front of the text is dropped).
        """
        surplus = len(tokens) - self._tail
        texts = self._tokenizer.batch_decode([tokens[start:] for start in range(max(1, surplus + 1))])
        return any(string in text for text in texts for string in self.strings)

    def _could_complete(self, text: str) -> bool:
        """Whether a token with this text can be the last of a match: it holds one, or starts with the end of one."""
        if _REPLACEMENT in text:
            return True
        return any(
            string in text or any(string.endswith(text[:size]) for size in range(1, len(text) + 1))
            for string in self.strings
        )


def _texts(tokenizer: Any) -> list[str]:
    """What each token id adds to a text that it stands in the middle of; `_REPLACEMENT` where that cannot be told."""
    ids = range(max(tokenizer.get_vocab().values()) + 1)
    alone = tokenizer.batch_decode([[i] for i in ids])
    # The second of two equal tokens: in front, decoders drop a space.
    doubled = tokenizer.batch_decode([[i, i] for i in ids])
    return [
        both[len(one) :] if both.startswith(one) else _REPLACEMENT for one, both in zip(alone, doubled, strict=True)
    ]
