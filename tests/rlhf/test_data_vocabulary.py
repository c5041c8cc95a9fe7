"""A tokenizer's vocabulary from its files is the one that `transformers` loads from them."""

import json
from pathlib import Path

import pytest

from gearshift.errors import UserError
from gearshift.rlhf.data.tokenizers import load_tokenizer
from gearshift.rlhf.data.vocabulary import has_tokenizer, read_vocabulary, rows_needed
from tests.rlhf.tiny import tiny_tokenizer


def test_it_is_what_transformers_loads(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path)
    vocabulary = read_vocabulary(tmp_path)
    assert vocabulary == load_tokenizer(str(tmp_path)).get_vocab()
    assert rows_needed(vocabulary) == 262


def test_unigram_and_tokens_of_the_config(tmp_path: Path) -> None:
    model = {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": [{"id": 2, "content": "c"}]}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"7": {"content": "d"}}}))
    assert read_vocabulary(tmp_path) == {"a": 0, "b": 1, "c": 2, "d": 7}
    assert rows_needed({"a": 0, "d": 7}) == 8, "ids may have gaps"


def test_no_tokenizer_and_a_broken_one(tmp_path: Path) -> None:
    assert read_vocabulary(tmp_path) is None
    assert not has_tokenizer(tmp_path)
    for content in ("{", "[]", "{}", '{"model": {"vocab": [1]}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=r"tokenizer\.json: "):
            read_vocabulary(tmp_path)
    assert has_tokenizer(tmp_path)
