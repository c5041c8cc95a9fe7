"""Which row gets a free slot next, and which rows need not read their prompt again.

Rows of one prompt (several answers to it, or the same text twice) stand together in the queue. The first of them reads
the prompt; the others get a copy of its keys and values, as long as some slot holds them, be it one that is free.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from gearshift.engine.batches import Prompts


@dataclass(frozen=True)
class Admission:
    """Rows for the next free slots, in this order: those that read their prompt, then those that copy it.

    `sources[i]`: the slot to copy the prompt of `copies[i]` from; it may be one that a row of `readers` just got.
    """

    readers: list[int]
    copies: list[int]
    sources: list[int]


class Waiting:
    """The rows that have no slot yet: longest prompt first, so that rows of like length are read together.

    `prompt_of[row]`: which of the distinct prompts it has; `left[prompt]`: how many of its rows still wait.
    """

    def __init__(self, prompts: Prompts, most_tokens: int):
        """`most_tokens`: bound on what is read at once, padding included (one prompt may be longer)."""
        self._most_tokens = most_tokens
        self._lengths: list[int] = prompts.lengths.tolist()
        self.prompt_of = _distinct(prompts)
        self.left = Counter(self.prompt_of)
        self._rows = sorted(range(len(prompts)), key=lambda row: (-self._lengths[row], self.prompt_of[row]))

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, contents: list[int], working: int) -> Admission:
        """The next rows, at least one, for some of the slots from `working` on.

        `contents[slot]`: the prompt whose keys and values a slot holds (-1: none), be the slot working or free.
        """
        holders = {prompt: slot for slot, prompt in reversed(list(enumerate(contents)))}
        at_once = max(1, self._most_tokens // self._lengths[self._rows[0]])
        # Of the prompts that were read, only the first in the queue has rows left. When a free slot alone holds it, it
        # is copied before another prompt is read into that slot.
        last_chance = holders.get(self.prompt_of[self._rows[0]], -1) >= working
        found = Admission([], [], [])
        for row in self._rows[: len(contents) - working]:
            prompt = self.prompt_of[row]
            if prompt in holders:
                found.copies.append(row)
                found.sources.append(holders[prompt])
            elif len(found.readers) < at_once and not last_chance:
                holders[prompt] = working + len(found.readers)
                found.readers.append(row)
            else:
                break
            self.left[prompt] -= 1
        self._rows = self._rows[len(found.readers) + len(found.copies) :]
        return found


def _distinct(prompts: Prompts) -> list[int]:
    """A number for each row, the same for rows with the same tokens."""
    if not len(prompts):
        return []
    columns = torch.arange(prompts.tokens.shape[1], device=prompts.tokens.device)
    # What stands after a prompt's end does not count.
    tokens = prompts.tokens.masked_fill(columns >= prompts.lengths[:, None], -1)
    numbers: list[int] = tokens.unique(dim=0, return_inverse=True)[1].tolist()
    return numbers
