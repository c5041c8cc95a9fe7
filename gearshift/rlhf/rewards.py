"""What scores the responses of a run: a reward model in the policy's tokens, one with a tokenizer of its own, or a
Python function. To the algorithm each is an object with `score(rollouts) -> [B] fp32`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from gearshift.engine import HybridEngine, RewardModel, Rollouts, Sampling, World
from gearshift.engine.classifier import Classifier, Texts
from gearshift.errors import SettingError, UserError, one_line
from gearshift.rlhf.agreement import of_every_rank
from gearshift.rlhf.data.batches import collate_prompts
from gearshift.rlhf.data.encoding import PromptRow
from gearshift.rlhf.data.formats import Keys, Prompt, read_prompt
from gearshift.rlhf.data.sources import Record
from gearshift.rlhf.settings import RewardSettings, names_function
from gearshift.rlhf.setup import has_same_tokens, offloaded, require_room

RewardFunction = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[float]]


class Reward(Protocol):
    """Scores of this rank's rollouts."""

    def score(self, rollouts: Rollouts) -> Tensor:
        """[B] fp32. Collective."""


class Asked:
    """The prompts of a run, to be found again from its rollouts; `tokenizer` is the policy's."""

    def __init__(self, tokenizer: Any, keys: Keys, *rows: Sequence[PromptRow]):
        self.tokenizer, self.keys, self._parts = tokenizer, keys, rows

    def rows(self, rollouts: Rollouts) -> list[PromptRow]:
        """The row behind each of the rollouts."""
        lengths, tokens, ids = (field.tolist() for field in (rollouts.lengths, rollouts.tokens, rollouts.ids))
        return [self._by_prompt[ids[b], tuple(tokens[b][: lengths[b]])] for b in range(len(rollouts))]

    def require_one_row_each(self) -> None:
        """Raises UserError where two rows hold the same prompt in the same place, with different fields."""
        for row in self._every():
            known = self._by_prompt[row.id, tuple(row.tokens)]
            if known.extra != row.extra:
                raise UserError(
                    f"{row.origin}: asks what {known.origin} asks, with other fields: a held-out prompt must not be "
                    "one that is trained on"
                )

    def _every(self) -> Iterator[PromptRow]:
        return (row for part in self._parts for row in part)

    @cached_property
    def _by_prompt(self) -> dict[tuple[int, tuple[int, ...]], PromptRow]:
        """Training and held-out rows are both numbered from 0: only with its tokens does a number name one row."""
        found: dict[tuple[int, tuple[int, ...]], PromptRow] = {}
        for row in self._every():
            found.setdefault((row.id, tuple(row.tokens)), row)
        return found

    def responses(self, rollouts: Rollouts) -> list[str]:
        """The text of each response, without EOS and other special tokens."""
        return [
            self.tokenizer.decode(response[mask].tolist(), skip_special_tokens=True)
            for response, mask in zip(rollouts.responses, rollouts.mask, strict=True)
        ]

    def ended(self, rollouts: Rollouts) -> list[bool]:
        """Whether each response ends with a special token, such as EOS."""
        special = set(self.tokenizer.all_special_ids)
        rows = [response[mask].tolist() for response, mask in zip(rollouts.responses, rollouts.mask, strict=True)]
        return [bool(row) and row[-1] in special for row in rows]

    def prompt(self, row: PromptRow) -> Prompt:
        """The row's prompt as it was given, without the policy's template."""
        return read_prompt(Record(row.extra, row.origin), self.keys)


def load_reward(settings: RewardSettings, asked: Asked, world: World, **common: Any) -> Reward:
    """What `reward.init` names; `common` is how its model is loaded. Collective.

    A model that reads the policy's tokens scores them as they are; another gets the text in its own.
    """
    if names_function(settings.init):
        return FunctionReward(load_function(settings.init, "reward.init"), settings.init, asked, world)
    common = offloaded(common, settings.offload)
    if not settings.chat_template and has_same_tokens(asked.tokenizer, settings.init, "reward.init"):
        require_room(asked.tokenizer, settings.init, "reward.init")
        return RewardModel.load(settings.init, world, **common)
    model = Classifier.load(settings.init, world, **common)
    return RetokenizedReward(model, reward_tokenizer(settings), asked, settings.chat_template)


def reward_tokenizer(settings: RewardSettings) -> Any:
    """The tokenizer of a reward model that has its own. Raises SettingError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.init)
    except Exception as error:  # a bad folder, no network, a hub name that is not there: many types
        raise SettingError("reward.init", f"{settings.init} has no tokenizer to load: {one_line(error)}") from error
    if settings.chat_template and not tokenizer.chat_template:
        raise SettingError("reward.chat_template", f"is on, but the tokenizer of {settings.init} has no chat template")
    require_room(tokenizer, settings.init, "reward.init")
    return tokenizer


def mean_over_prompts(
    policy: HybridEngine,
    prompts: Sequence[PromptRow],
    sampling: Sampling,
    world: World,
    *measures: Callable[[Rollouts], Tensor],
) -> list[float]:
    """One answer to each of the prompts, which every rank holds; the mean of each measure, `(rollouts) -> [B]`, over
    them. Collective."""
    own = prompts[world.share(len(prompts))]
    with policy.rollout() as generator:
        answers = generator.generate(collate_prompts(own or prompts[:1]), sampling)
    found = torch.stack([measure(answers) for measure in measures])[:, : len(own)]  # without a prompt: only took part
    return [float(total) / len(prompts) for total in world.sum(found.double().sum(1))]


class RetokenizedReward:
    """A reward model with a tokenizer of its own: prompt and response as text, in its tokens.

    A decoder reads the prompt's tokens and then the response's, tokenized apart as `gearshift reward` does, with BOS
    where its tokenizer puts one and EOS where the policy wrote one. An encoder reads the two as a pair of texts. With
    `chat_template`, either reads them as turns of its own template.
    """

    def __init__(self, model: Classifier, tokenizer: Any, asked: Asked, chat_template: bool):
        self.model, self.tokenizer, self.asked, self.chat_template = model, tokenizer, asked, chat_template

    def score(self, rollouts: Rollouts) -> Tensor:
        """[B] fp32. Collective."""
        return self.model.score(self.texts(rollouts))

    def texts(self, rollouts: Rollouts) -> Texts:
        """The rollouts in the reward model's tokens."""
        rows, responses = self.asked.rows(rollouts), self.asked.responses(rollouts)
        if self.chat_template:
            chats = [self._chat(row, response) for row, response in zip(rows, responses, strict=True)]
            return self._padded([(tokens, []) for tokens in chats])
        prompts = [row.text for row in rows]
        if not self.model.causal:
            both = self.tokenizer(prompts, responses)
            kinds = both.get("token_type_ids", [[]] * len(rows))  # where the family's tokenizer gives them
            return self._padded(list(zip(both["input_ids"], kinds, strict=True)))
        ended = self.asked.ended(rollouts)
        return self._padded([(self._joined(*row), []) for row in zip(prompts, responses, ended, strict=True)])

    def _joined(self, prompt: str, response: str, ended: bool) -> list[int]:
        tokenizer = self.tokenizer
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        puts_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        tokens = [bos] if puts_bos else []
        for text in (prompt, response):
            tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*tokens, eos] if ended and eos is not None else tokens

    def _chat(self, row: PromptRow, response: str) -> list[int]:
        prompt = self.asked.prompt(row)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = self.tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": response}], tokenize=False)
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def _padded(self, rows: list[tuple[list[int], list[int]]]) -> Texts:
        """Rows of (tokens, kinds); a text of no token at all is one pad token."""
        pad = int(self.tokenizer.pad_token_id or 0)
        width = max(1, *(len(tokens) for tokens, _ in rows))
        tokens = torch.full((len(rows), width), pad, dtype=torch.int64)
        kinds = torch.zeros(len(rows), width, dtype=torch.int64)
        lengths = torch.tensor([max(1, len(row)) for row, _ in rows])
        for number, (row, own) in enumerate(rows):
            tokens[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
            kinds[number, : len(own)] = torch.tensor(own, dtype=torch.int64)
        return Texts(tokens, lengths, kinds)


class FunctionReward:
    """A Python function `(prompts, responses, rows) -> scores`, called on each rank with that rank's rollouts.

    `prompts` are the texts that the policy read, `rows` all fields of the rows that they came from.
    """

    def __init__(self, function: RewardFunction, name: str, asked: Asked, world: World):
        """Raises UserError where rows cannot be told apart by their prompts; see `Asked.require_one_row_each`."""
        self.function, self.name, self.asked, self.world = function, name, asked, world
        asked.require_one_row_each()

    def score(self, rollouts: Rollouts) -> Tensor:
        """[B] fp32. Collective. What one rank's call fails at, every rank raises as UserError."""
        rows = self.asked.rows(rollouts)
        scores: list[float] = []
        problem = None
        try:
            found = self.function(
                [row.text for row in rows], self.asked.responses(rollouts), [dict(row.extra) for row in rows]
            )
            scores = [float(score) for score in found]
            if len(scores) != len(rows):
                problem = f"gave {len(scores)} scores for {len(rows)} responses"
            elif bad := [b for b, score in enumerate(scores) if not math.isfinite(score)]:
                problem = f"gave {scores[bad[0]]} for the response to {rows[bad[0]].origin}"
        except Exception as error:  # whatever the user's code raises
            problem = f"failed: {type(error).__name__}: {one_line(error)}"
        told = next((told for told in of_every_rank(problem) if told), None)
        if told:
            raise UserError(f"reward.init: {self.name} {told}")
        return torch.tensor(scores, dtype=torch.float32, device=self.world.device)


def load_function(name: str, field: str) -> Callable[..., Any]:
    """The function that "module:function" names. Raises SettingError when it is not there."""
    module, _, function = name.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise SettingError(field, f"{name}: {one_line(error)}; write it as module:function") from error
    if not callable(found):
        raise SettingError(field, f"{name} is a {type(found).__name__}, not a function")
    return found
