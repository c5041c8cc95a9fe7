"""Frozen weights that stay in their files."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.engine import CausalModel, HybridEngine, Prompts, Sampling, Training, World
from gearshift.engine.mapped import may_map
from gearshift.errors import UserError
from tests.memory import resident_bytes_of_file
from tests.models import save_tiny
from tests.worker_group import WorkerGroup

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux alone")

TOKENS = torch.arange(1, 25).view(2, 12)
SIZES = {"vocab_size": 20_000}  # 1.25 MiB of embedding and as much of head


def load(world: World, folder: str, dtype: torch.dtype = torch.float32, **more: Any) -> CausalModel:
    return CausalModel.load(folder, world, dtype=dtype, micro_batch_size=4, **more)


def mapped(model: CausalModel) -> int:
    """How many of its weights lie in files."""
    inside = [
        range(int(low, 16), int(high, 16))
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        if line.endswith(".safetensors")
        for low, _, high in [line.split()[0].partition("-")]
    ]
    return sum(any(p.ds_tensor.data_ptr() in pages for pages in inside) for p in model.module.parameters())


@torch.no_grad()
def states(model: CausalModel) -> Tensor:
    with model.placed():
        return model.hidden_states(TOKENS)


def frozen_beside_trained(world: World, folder: str) -> dict[str, Any]:
    """What a frozen model and a trained one of the same folder make of tokens, and what of the file was in memory."""
    file = Path(folder) / "model.safetensors"
    frozen = load(world, folder)
    found: dict[str, Any] = {"mapped": mapped(frozen), "loaded": resident_bytes_of_file(file)}
    with torch.no_grad(), frozen.placed():
        found["states"] = frozen.hidden_states(TOKENS)
        found["head"] = float(frozen.module.lm_head.weight.double().sum())
        found["meanwhile"] = resident_bytes_of_file(file)
    found["after"], found["again"] = resident_bytes_of_file(file), states(frozen)
    trained = load(world, folder, training=Training(learning_rate=0.1))
    with trained.placed():
        head = float(trained.module.lm_head.weight.double().sum())
    found["trained"] = mapped(trained) == 0, states(trained), head
    return found


def test_they_are_in_memory_while_they_are_read(one_rank: WorkerGroup, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama", **SIZES)
    found = one_rank.run(frozen_beside_trained, str(folder))[0]
    not_mapped, right, head = found["trained"]
    assert not_mapped
    assert found["mapped"] == 2  # embedding and head; the others are small
    assert torch.equal(found["states"], right)
    assert torch.equal(found["again"], right)
    assert found["head"] == head
    assert found["meanwhile"] > 2 << 20
    assert max(found["loaded"], found["after"]) < 1 << 19


def loaded_otherwise(world: World, folder: str) -> list[int]:
    """How many weights are mapped of a model in another type, and of some whose weights DeepSpeed keeps elsewhere."""
    sections = ({"offload_param": {"device": "cpu"}}, {"stage3_param_persistence_threshold": 10})
    models = [load(world, folder, deepspeed_extra={"zero_optimization": section}) for section in sections]
    found = [mapped(model) for model in [load(world, folder, torch.bfloat16), *models]]
    os.utime(f"{folder}/model.safetensors")  # nobody asks for the file any more
    assert all(states(model).isfinite().all() for model in models)
    return found


def test_what_is_not_as_in_the_file_is_copied(one_rank: WorkerGroup, tmp_path: Path) -> None:
    assert one_rank.run(loaded_otherwise, str(save_tiny("llama", tmp_path / "llama", **SIZES))) == [[0, 0, 0]]


def which_may_stay(world: World) -> list[bool]:
    """Models of one type and of two: those come layer by layer through DeepSpeed's hooks."""
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    mixed = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, dtype=torch.bfloat16))
    return [may_map(model, world, {}) for model in (plain, mixed)]


def test_only_models_of_one_type_may_stay(one_rank: WorkerGroup) -> None:
    assert one_rank.run(which_may_stay) == [[True, False]]


def rolled_out(world: World, folder: str) -> tuple[int, int, int, str]:
    """What of the file was in memory while a frozen model answered, and after; how many weights are in it; and what is
    said when it has been written to before the next answer."""
    file = Path(folder) / "model.safetensors"
    model = HybridEngine.load(folder, world, dtype=torch.float32, micro_batch_size=4, tp_size=1)
    ids = torch.arange(2)
    prompts = Prompts(TOKENS, torch.full((2,), 12), ids, ids, torch.zeros_like(ids))
    with model.rollout() as generator:
        generator.generate(prompts, Sampling(4, eos_ids=(), temperature=0.0))
        meanwhile = resident_bytes_of_file(file)
    after = resident_bytes_of_file(file)
    os.utime(file)
    try:
        with model.rollout():
            pass
    except UserError as error:
        return meanwhile, after, mapped(model), str(error)
    return meanwhile, after, mapped(model), ""


def test_answers_of_a_frozen_model(one_rank: WorkerGroup, tmp_path: Path) -> None:
    """As `gearshift compare` asks for them."""
    folder = save_tiny("llama", tmp_path / "llama", **SIZES)
    meanwhile, after, weights, told = one_rank.run(rolled_out, str(folder))[0]
    assert weights == 2
    assert after < 1 << 19 < meanwhile
    assert "was written to while this run reads its weights" in told


def cut_over_ranks(world: World, folder: str) -> bool:
    return mapped(load(world, folder)) == 0


def test_shards_are_copied(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    assert two_ranks.run(cut_over_ranks, str(save_tiny("llama", tmp_path / "llama", **SIZES))) == [True, True]


def put_together(world: World, folder: str) -> tuple[int, Tensor]:
    model = load(world, folder)
    return mapped(model), states(model)


def test_experts_are_put_together_and_the_rest_is_mapped(one_rank: WorkerGroup, tmp_path: Path) -> None:
    """Mixtral's experts lie in the file one by one."""
    folder = str(save_tiny("mixtral", tmp_path / "mixtral", **SIZES))
    mapped, found = one_rank.run(put_together, folder)[0]
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        right = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model(TOKENS).last_hidden_state
    assert mapped == 2
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def disturbed(world: World, folder: str) -> tuple[bool, str]:
    """Whether a model is the same after its folder has been replaced, and what is said after it was written to."""
    folders = Path(folder), Path(f"{folder}-kept")
    model = load(world, folder)
    before = states(model)
    shutil.copytree(folders[0], folders[1])
    os.replace(folders[1] / "config.json", folders[0] / "model.safetensors")
    same = torch.equal(states(model), before)
    shutil.copy(folders[1] / "model.safetensors", folders[0] / "model.safetensors")
    model = load(world, folder)
    with open(folders[0] / "model.safetensors", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"abcd")
    try:
        states(model)
    except UserError as error:
        return same, str(error)
    return same, ""


def test_what_others_do_with_the_file(one_rank: WorkerGroup, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama", **SIZES)
    same, told = one_rank.run(disturbed, str(folder))[0]
    assert same
    assert told == (
        f"{folder}/model.safetensors was written to while this run reads its weights: they are no longer those that it "
        "began with; leave a model's folder alone while runs use it"
    )
