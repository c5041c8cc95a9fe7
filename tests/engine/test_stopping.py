"""A stop string ends an answer with the token that completes it, however tokens cut its characters."""

from typing import Any

import pytest
import torch

from gearshift.engine.stopping import StopStrings
from gearshift.errors import UserError
from gearshift.rlhf.data.tokenizers import train_tokenizer

TEXTS = [
    "the cat sat on the mat. stop here, or stopper there\n\nHuman: no more",
    "über die brücke: ö ö 🙂 🙂🙂 ende",
    "a  b   c\n\n\nd",
]
STOPS = ["\n\nHuman:", "stop", "ö", "🙂", " ", "cat sat", "ö 🙂", "\n", "die b"]


def byte_level() -> Any:
    """Trained on other characters beyond ASCII than those of the texts, with some of their bytes in common."""
    return train_tokenizer([TEXTS[0], "😀😁😂 äüäü 😀😁😂"], 300)


def sentencepiece(pieces: list[str]) -> Any:
    """Words that begin with their space, and a token for every byte: the decoder of Llama 2."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), *((p, -1.0) for p in pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def ends(tokenizer: Any, tokens: list[int], strings: list[str]) -> int | None:
    """After how many tokens the rule says stop, asked after every token."""
    stop = StopStrings(tokenizer, strings)
    responses = torch.tensor([[0] * len(tokens), tokens])  # row 0 takes no part
    for count in range(1, len(tokens) + 1):
        if bool(stop.completed(responses, torch.tensor([1]), torch.tensor([count]))):
            return count
    return None


def first_with(tokenizer: Any, tokens: list[int], strings: list[str]) -> int | None:
    """The definition: how many tokens it takes until the whole decoded text holds one of the strings."""
    for count in range(1, len(tokens) + 1):
        if any(string in tokenizer.decode(tokens[:count]) for string in strings):
            return count
    return None


@pytest.mark.parametrize("string", STOPS)
def test_the_token_that_completes_it_is_the_last(string: str) -> None:
    tokenizer = byte_level()
    found = [ends(tokenizer, tokenizer.encode(text), [string]) for text in TEXTS]
    assert found == [first_with(tokenizer, tokenizer.encode(text), [string]) for text in TEXTS]
    assert any(found)


def test_characters_are_split_over_tokens_in_these_tests() -> None:
    tokenizer = byte_level()
    alone = [tokenizer.decode([token]) for token in tokenizer.encode("🙂ö")]
    assert sum("\ufffd" in text for text in alone) >= 2


@pytest.mark.parametrize("string", [" stop", "stop", "\n", "é", "p\n", " ", "🙂\n", "top op"])
def test_sentencepiece_with_bytes(string: str) -> None:
    """Spaces at the front of tokens, which the decoder drops from the first; newlines and characters as bytes."""
    tokenizer = sentencepiece(["▁stop", "stop", "▁s", "top", "▁op", "op", "p", "▁"])
    ids = tokenizer.get_vocab()

    def spell(text: str) -> list[int]:
        return [ids[f"<0x{byte:02X}>"] for byte in text.encode()]

    answers = [
        [ids["▁op"], ids["▁stop"], *spell("\n")],
        [ids["▁s"], ids["top"], ids["▁op"], *spell("🙂🙂\n"), ids["▁"], *spell("é")],
        [ids["▁s"], *spell("é\n"), ids["top"], ids["op"], ids["▁op"]],
        [ids["p"], *spell("\né🙂"), ids["stop"]],
    ]
    found = [ends(tokenizer, answer, [string]) for answer in answers]
    assert found == [first_with(tokenizer, answer, [string]) for answer in answers]
    assert any(found)


@pytest.mark.parametrize("seed", range(4))
def test_random_tokens(seed: int) -> None:
    """400 random tokens (most of the bytes in them no characters): several strings at once, the first one ends it."""
    tokenizer = byte_level()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(len(tokenizer), (400,), generator=generator).tolist()
    whole = tokenizer.decode(tokens)
    strings = [whole[at : at + 3] for at in (500, 300, 350)]
    strings = [string for string in strings if string and "\ufffd" not in string] or ["zzz", "q"]
    assert ends(tokenizer, tokens, strings) == first_with(tokenizer, tokens, strings)


def test_rows_are_asked_after_apart_and_special_tokens_have_their_text() -> None:
    tokenizer = byte_level()
    eos = tokenizer.eos_token
    stop = StopStrings(tokenizer, [eos, "mat"])
    rows = [tokenizer.encode(text) for text in ("the mat", "the cat", f"a{eos}")]
    responses = torch.zeros(3, max(map(len, rows)), dtype=torch.int64)
    for b, row in enumerate(rows):
        responses[b, : len(row)] = torch.tensor(row)
    counts = torch.tensor([len(row) for row in rows])
    assert stop.completed(responses, torch.tensor([2, 1, 0]), counts[[2, 1, 0]]).tolist() == [True, False, True]


def test_tokens_that_the_tokenizer_does_not_know_end_nothing() -> None:
    tokenizer = byte_level()
    beyond = torch.tensor([[len(tokenizer) + 5]])
    assert not StopStrings(tokenizer, ["a"]).completed(beyond, torch.tensor([0]), torch.tensor([1])).any()


def test_few_tokens_are_ever_decoded() -> None:
    """Only one after which a string could be complete: for 'cat sat' those that begin with t, at, sat ..."""
    tokenizer = byte_level()
    stop = StopStrings(tokenizer, ["cat sat"])
    may_end = {tokenizer.decode([token]) for token in stop._may_end.nonzero()[:, 0].tolist()}
    readable = {text for text in may_end if "\ufffd" not in text}
    assert readable
    assert all(any("cat sat".endswith(text[:n]) for n in range(1, 8)) for text in readable)
    assert "t" in readable
    assert "c" not in readable


@pytest.mark.parametrize("strings", [[], ["a", ""]])
def test_an_empty_string_is_an_error(strings: list[str]) -> None:
    with pytest.raises(UserError, match=r"^rollout\.stop: a stop string is empty"):
        StopStrings(byte_level(), strings)
