"""What cannot be loaded is one line on every rank, whichever rank reads the files."""

import json
from pathlib import Path

import pytest
import torch

from gearshift.engine import CausalModel, RewardModel, World
from gearshift.engine.loading import config_of
from gearshift.errors import UserError
from tests.models import save_tiny
from tests.worker_group import WorkerGroup


def told(world: World, folder: str, new_head: bool = False) -> str:
    common = {"dtype": torch.float32, "micro_batch_size": 1}
    try:
        if new_head:
            RewardModel.load(folder, world, new_head=True, **common)  # type: ignore[arg-type]
        else:
            CausalModel.load(folder, world, **common)  # type: ignore[arg-type]
    except UserError as error:
        return str(error)
    return "loaded"


def cut_off(folder: Path) -> str:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    return f"{weights}: has "


def without_a_shard(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "b.safetensors"}}))
    return f"{folder}/b.safetensors: is missing, though {index.name} names it"


def broken_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text("{")
    return f"{folder}/model.safetensors.index.json: is not JSON"


def unknown_type(folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": "zebra"}))
    return f"{folder}/config.json: "


def impossible_sizes(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "grelu"}))
    return f"{folder}/config.json: no llama can be built from it: KeyError"


def broken_generation_config(folder: Path) -> str:
    (folder / "generation_config.json").write_text("[")
    return f"{folder}/generation_config.json: "


@pytest.mark.parametrize(
    "spoil", [cut_off, without_a_shard, broken_index, unknown_type, impossible_sizes, broken_generation_config]
)
def test_a_spoilt_folder(two_ranks: WorkerGroup, tmp_path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    folder = save_tiny("llama", tmp_path / "llama")
    says = spoil(folder)
    first, second = two_ranks.run(told, str(folder), timeout=60)
    assert first == second
    assert first.startswith(says)
    assert "\n" not in first


@pytest.mark.parametrize("family", ["cohere", "granite"])
def test_a_family_without_a_classifier(two_ranks: WorkerGroup, tmp_path: Path, family: str) -> None:
    folder = save_tiny(family, tmp_path / family)
    for found in two_ranks.run(told, str(folder), True, timeout=60):
        assert found == (
            f"{folder}/config.json: transformers has no sequence classifier for {family}: use another family, such as "
            "llama or qwen2"
        )


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_config_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as caught:
        config_of(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ")
    assert "\n" not in str(caught.value)
