"""What a row means: which of its fields are prompt, answer, preference or document.

| rows for | fields |
|---|---|
| demonstrations | `prompt` + `completion`; `messages`, the last the assistant's; `inputs` + `targets` (FLAN, P3) |
| comparisons | `context` or `prompt` + `completions[]` (`text`, `rank`); `chosen` + `rejected`, perhaps `prompt` |
| prompts | `prompt`; `context`; `inputs`; `messages`; `chosen` + `rejected` (the part that they share) |
| documents | `text` |

Wherever a text stands, a list of messages (`role`, `content`) may stand too. Field names are those of `Keys`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, cast

from gearshift.errors import UserError
from gearshift.rlhf.data.sources import Record

Message = dict[str, str]  # one turn of a dialogue: `role`, `content`
Prompt = str | list[Message]
ROLES = {"system": "System", "user": "Human", "assistant": "Assistant"}  # hh-rlhf's names


@dataclass(frozen=True)
class Keys:
    """The names of the fields in the user's rows."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    chosen: str = "chosen"
    rejected: str = "rejected"
    context: str = "context"
    completions: str = "completions"
    text: str = "text"
    inputs: str = "inputs"
    targets: str = "targets"
    margin: str | None = None  # by how much `chosen` is better than `rejected`
    # What opens the assistant's turn in dialogues written as one text; cuts the prompt off `chosen` and `rejected`.
    turn: str = "\n\nAssistant:"


@dataclass(frozen=True)
class DemonstrationText:
    """A prompt and the answer to imitate."""

    prompt: Prompt
    completion: str


@dataclass(frozen=True)
class ComparisonText:
    """A prompt and its answers; the lower the rank the better, equal ranks are ties.

    `margin`: by how much the better answer of a pair is to be rewarded above the worse, in reward units.
    """

    prompt: Prompt
    completions: list[str]
    ranks: list[float]
    margin: float = 0.0


def read_document(record: Record, keys: Keys) -> str:
    """The row's pretraining text."""
    return _text(record, _field(record, keys.text), keys.text)


def read_prompt(record: Record, keys: Keys) -> Prompt:
    """The row's prompt, in whichever of the formats it is given."""
    fields = record.fields
    for key in (keys.prompt, keys.context, keys.inputs):
        if key in fields:
            return _prompt(record, fields[key], key)
    if keys.messages in fields:
        messages = _messages(record, fields[keys.messages], keys.messages)
        prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not prompt:
            raise UserError(f"{record.origin}: field '{keys.messages}' has no turn before the assistant's")
        return prompt
    if keys.chosen in fields and keys.rejected in fields:
        return _read_pair(record, keys).prompt
    raise _missing(record, keys.prompt)


def read_demonstration(record: Record, keys: Keys) -> DemonstrationText:
    """The row's prompt and the answer to imitate. Of a dialogue, only the assistant's last turn is the answer."""
    fields = record.fields
    if keys.prompt not in fields and keys.messages in fields:
        return DemonstrationText(*_split_dialogue(record, fields[keys.messages], keys.messages))
    if keys.prompt not in fields and keys.inputs in fields:
        prompt_key, completion_key = keys.inputs, keys.targets
    else:
        prompt_key, completion_key = keys.prompt, keys.completion
    prompt = _prompt(record, _field(record, prompt_key), prompt_key)
    return DemonstrationText(prompt, _completion(record, _field(record, completion_key), completion_key))


def read_comparison(record: Record, keys: Keys) -> ComparisonText:
    """The row's prompt and ranked answers: K-wise if it has completions, else a pair."""
    if keys.completions in record.fields:
        return _read_ranked(record, keys)
    pair = _read_pair(record, keys)
    if keys.margin is None:
        return pair
    value = _field(record, keys.margin)
    margin = _number(record, value, f"field '{keys.margin}'", "a finite number of 0 or more", least=0.0)
    return dataclasses.replace(pair, margin=margin)


def _read_ranked(record: Record, keys: Keys) -> ComparisonText:
    prompt_key = keys.prompt if keys.context not in record.fields and keys.prompt in record.fields else keys.context
    prompt = _prompt(record, _field(record, prompt_key), prompt_key)
    answers = record.fields[keys.completions]
    if not isinstance(answers, list) or len(answers) < 2:
        raise UserError(f"{record.origin}: field '{keys.completions}' must be a list of two or more answers")
    texts, ranks = [], []
    for number, answer in enumerate(answers):
        name = f"{keys.completions}[{number}]"
        if not isinstance(answer, dict) or "text" not in answer or "rank" not in answer:
            there = ", ".join(answer) if isinstance(answer, dict) else type(answer).__name__
            raise UserError(f"{record.origin}: {name} needs 'text' and 'rank'; it has: {there}")
        texts.append(_completion(record, answer["text"], f"{name}.text"))
        ranks.append(_number(record, answer["rank"], f"{name}.rank", "a finite number (lower is better)"))
    return ComparisonText(prompt, texts, ranks)


def _read_pair(record: Record, keys: Keys) -> ComparisonText:
    chosen, rejected = _field(record, keys.chosen), _field(record, keys.rejected)
    if _is_dialogue(chosen) and _is_dialogue(rejected):
        return _common_dialogue(record, chosen, rejected, keys)
    if keys.prompt not in record.fields:
        return _common_text(record, _text(record, chosen, keys.chosen), _text(record, rejected, keys.rejected), keys)
    prompt = _prompt(record, record.fields[keys.prompt], keys.prompt)
    return _pair(prompt, _completion(record, chosen, keys.chosen), _completion(record, rejected, keys.rejected))


def _pair(prompt: Prompt, better: str, worse: str) -> ComparisonText:
    return ComparisonText(prompt, [better, worse], [0.0, 1.0])


def _common_text(record: Record, chosen: str, rejected: str, keys: Keys) -> ComparisonText:
    """The prompt that two whole dialogues share: all up to the last assistant turn that both open (hh-rlhf)."""
    shared = next((at for at, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    at = chosen.rfind(keys.turn, 0, min(len(chosen), len(rejected)) if shared is None else shared)
    if at < 0:
        raise UserError(
            f"{record.origin}: no field '{keys.prompt}', and '{keys.chosen}' and '{keys.rejected}' share no "
            f"{keys.turn!r} turn that would end the prompt; the row has: {', '.join(record.fields)}"
        )
    end = at + len(keys.turn)
    return _pair(chosen[:end], chosen[end:], rejected[end:])


def _common_dialogue(record: Record, chosen: Any, rejected: Any, keys: Keys) -> ComparisonText:
    """The same for dialogues given as messages: they must differ in the assistant's last turn alone."""
    prompt, better = _split_dialogue(record, chosen, keys.chosen)
    other, worse = _split_dialogue(record, rejected, keys.rejected)
    if prompt != other:
        raise UserError(f"{record.origin}: '{keys.chosen}' and '{keys.rejected}' differ before their last turn")
    return _pair(prompt, better, worse)


def _split_dialogue(record: Record, value: Any, key: str) -> tuple[list[Message], str]:
    messages = _messages(record, value, key)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise UserError(f"{record.origin}: field '{key}' must end with an assistant's turn after a prompt")
    return messages[:-1], messages[-1]["content"]


def _is_dialogue(value: Any) -> bool:
    """Messages that hold a prompt as well, not the answer alone."""
    return isinstance(value, list) and len(value) > 1


def _prompt(record: Record, value: Any, key: str) -> Prompt:
    return _messages(record, value, key) if isinstance(value, list) else _text(record, value, key)


def _completion(record: Record, value: Any, key: str) -> str:
    if not isinstance(value, list):
        return _text(record, value, key)
    messages = _messages(record, value, key)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise UserError(f"{record.origin}: field '{key}' must be text or one message of the assistant")
    return messages[0]["content"]


def _messages(record: Record, value: Any, key: str) -> list[Message]:
    whole = (
        isinstance(value, list)
        and value
        and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in value
        )
    )
    if not whole:
        raise UserError(f"{record.origin}: field '{key}' must be a list of messages with 'role' and 'content' texts")
    for turn in value:
        _text(record, turn["role"], key)
        _text(record, turn["content"], key)
    return cast(list[Message], value)


def plain_prompt(prompt: Prompt, template: str) -> str:
    """A prompt as text without a chat template, a dialogue of several turns as in hh-rlhf, where `{prompt}` stands."""
    return template.replace("{prompt}", prompt if isinstance(prompt, str) else _plain_dialogue(prompt))


def _plain_dialogue(messages: list[Message]) -> str:
    if len(messages) == 1:
        return messages[0]["content"]
    turns = [f"\n\n{ROLES.get(turn['role'], turn['role'])}: {turn['content']}" for turn in messages]
    return "".join(turns) + "\n\nAssistant:"


def require_prompt(origin: str, prompt: str | list[int]) -> None:
    """Raises UserError for a prompt without text or tokens."""
    if not prompt:
        raise UserError(f"{origin}: the prompt is empty, so there is nothing to answer")


def _text(record: Record, value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{record.origin}: field '{key}' must be text, it is {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can say "\ud83d" alone, which no tokenizer takes
        raise UserError(
            f"{record.origin}: field '{key}' is not Unicode text: half a surrogate pair at character {error.start}"
        ) from error
    return value


def _number(record: Record, value: Any, name: str, wanted: str, least: float = -math.inf) -> float:
    """`value` as a finite number, at least `least`; the error says that it must be what is `wanted`."""
    # 2**128, the end of fp32, also bounds the whole numbers that JSON has no limit for.
    if isinstance(value, bool) or not isinstance(value, int | float) or not max(least, -(2**128)) <= value < 2**128:
        raise UserError(f"{record.origin}: {name} must be {wanted}, not {value!r:.60}")
    return float(value)


def _field(record: Record, key: str) -> Any:
    if key not in record.fields:
        raise _missing(record, key)
    return record.fields[key]


def _missing(record: Record, key: str) -> UserError:
    return UserError(f"{record.origin}: no field '{key}'; the row has: {', '.join(record.fields) or 'no field at all'}")
