"""Models that read another model's tokens: the same ids for the same tokens, and a row for each."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gearshift.errors import SettingError
from gearshift.rlhf.data.tokenizers import load_tokenizer
from gearshift.rlhf.settings import DataSettings
from gearshift.rlhf.setup import require_same_tokens, tokenizer_of
from tests.models import tiny_config
from tests.rlhf.tiny import VOCABULARY, tiny_tokenizer


def model_folder(folder: Path, vocab_size: int = VOCABULARY) -> str:
    """A llama's config and the tiny tokenizer."""
    tiny_config("llama", vocab_size=vocab_size).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def in_older_files(folder: str, changes: dict[str, int] | None = None) -> str:
    """The same tokenizer without a tokenizer.json: vocab.json and merges.txt, as GPT-2's are."""
    content = json.loads((Path(folder) / "tokenizer.json").read_text())
    vocabulary: dict[str, Any] = {**content["model"]["vocab"], **(changes or {})}
    vocabulary |= {token["content"]: token["id"] for token in content["added_tokens"]}
    (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary))
    (Path(folder) / "merges.txt").write_text("\n".join(" ".join(pair) for pair in content["model"]["merges"]) + "\n")
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "unk_token": None, "bos_token": None}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))
    (Path(folder) / "tokenizer.json").unlink()
    return folder


@pytest.fixture
def policy(tmp_path: Path) -> Any:
    return load_tokenizer(model_folder(tmp_path / "policy"))


def error_of(tokenizer: Any, init: str) -> str:
    with pytest.raises(SettingError) as caught:
        require_same_tokens(tokenizer, init, "reward.init")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_same_tokens_pass_in_whichever_files(policy: Any, tmp_path: Path) -> None:
    require_same_tokens(policy, model_folder(tmp_path / "same"), "reward.init")
    require_same_tokens(policy, in_older_files(model_folder(tmp_path / "older")), "reward.init")


def test_other_tokens_are_refused_in_whichever_files(policy: Any, tmp_path: Path) -> None:
    older = in_older_files(model_folder(tmp_path / "older"), {"a": 9, "b": 8})
    assert error_of(policy, older) == (
        f"reward.init: the tokenizer of {older} is not the policy's, so it would read other tokens"
    )


def test_a_folder_without_a_tokenizer_is_taken_at_its_word(policy: Any, tmp_path: Path) -> None:
    folder = Path(model_folder(tmp_path / "bare"))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    require_same_tokens(policy, str(folder), "reward.init")


def test_a_tokenizer_that_cannot_be_loaded_is_one_line(policy: Any, tmp_path: Path) -> None:
    folder = Path(model_folder(tmp_path / "broken"))
    (folder / "tokenizer.json").write_text("{}")
    assert error_of(policy, str(folder)).startswith(f"reward.init: the tokenizer of {folder} cannot be loaded")


def test_a_model_has_a_row_for_every_token(policy: Any, tmp_path: Path) -> None:
    small = model_folder(tmp_path / "small", VOCABULARY - 1)
    told = f"{small}: its config.json has vocab_size 260, but the tokenizer has 261 token ids"
    assert error_of(policy, small).startswith(f"reward.init: {told}")
    with pytest.raises(SettingError) as caught:
        tokenizer_of(DataSettings(), small)
    assert str(caught.value).startswith(f"policy.init: {told}")
    shutil.rmtree(small)
    tokenizer_of(DataSettings(), model_folder(Path(small), VOCABULARY + 1))
