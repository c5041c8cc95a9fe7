"""A model folder's files: whole, or one line that names the one that is not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gearshift.engine.folder import INDEX, SINGLE, config_number, read_object, weight_files
from gearshift.errors import UserError


def sharded(folder: Path) -> Path:
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, folder / "one", metadata={"format": "pt"})
    save_file({"c": torch.ones(5, dtype=torch.bfloat16)}, folder / "two")
    weight_map = {"a": "one", "b": "one", "c": "two"}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 38}, "weight_map": weight_map}))
    return folder


def error_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        weight_files(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}", "folder")


def test_where_each_tensor_lies(tmp_path: Path) -> None:
    assert weight_files(sharded(tmp_path)) == {"a": "one", "b": "one", "c": "two"}
    (tmp_path / INDEX).unlink()
    save_file({"a": torch.ones(3), "b": torch.ones(0, 2)}, tmp_path / SINGLE)
    assert weight_files(tmp_path) == {"a": SINGLE, "b": SINGLE}


def test_a_file_that_is_missing_cut_off_or_another(tmp_path: Path) -> None:
    assert error_of(tmp_path) == "folder: no model.safetensors (or .index.json) in this folder"
    one = (sharded(tmp_path) / "one").read_bytes()
    (tmp_path / "one").write_bytes(one[:-1])
    assert error_of(tmp_path) == (
        f"folder/one: has {len(one) - 1} bytes, its header says {len(one)}: copy it there again"
    )
    for content in (one[:40], b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", one[:8] + b"[]"):
        (tmp_path / "one").write_bytes(content)
        assert error_of(tmp_path) == "folder/one: is not a whole safetensors file: copy it there again"
    (tmp_path / "one").write_bytes((tmp_path / "two").read_bytes())
    assert error_of(tmp_path) == f"folder/one: lacks a, which {INDEX} says it holds"
    (tmp_path / "one").unlink()
    assert error_of(tmp_path) == f"folder/one: is missing, though {INDEX} names it: copy it there again"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index(tmp_path: Path, content: str) -> None:
    (sharded(tmp_path) / INDEX).write_text(content)
    assert error_of(tmp_path).startswith(f"folder/{INDEX}: ")


def test_a_json_object_or_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content, told in [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[1]", "should hold a JSON object, not a"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=told):
            read_object(path)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_object(path)


def test_numbers_of_a_config() -> None:
    config = {"n_head": 4, "text_config": {"hidden_size": 8}, "vocab_size": None}
    assert config_number(config, "num_attention_heads", "n_head") == 4
    assert config_number(config, "hidden_size") == 8
    assert config_number(config, "vocab_size") is None
