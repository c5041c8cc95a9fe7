"""A checkpoint's shards as a folder: what `save_pretrained` of the same weights writes, byte for byte."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gearshift.engine import CausalModel, Training, World
from gearshift.engine.checkpoints.exporting import export, export_adapters
from gearshift.engine.checkpoints.manifest import Manifest
from gearshift.engine.checkpoints.writing import Checkpoints
from gearshift.engine.saving import MAX_FILE_BYTES, save_adapters, save_pretrained, small_files
from gearshift.engine.settings import LoraSettings
from gearshift.errors import UserError
from gearshift.launch.export import main as export_main
from tests.models import save_tiny
from tests.worker_group import WorkerGroup

from .test_writing import step_of, train


def saved_both_ways(
    world: World,
    init: str,
    folder: str,
    dtype: torch.dtype,
    max_file_bytes: int = MAX_FILE_BYTES,
    lora: LoraSettings | None = None,
    average: float | None = None,
) -> None:
    """A model after two steps: in a checkpoint, and as the run would save it (`saved`, `adapter`)."""
    training = Training(1e-2, average=average)
    model = CausalModel.load(init, world, dtype=dtype, micro_batch_size=2, training=training, lora=lora)
    train(world, {"policy": model}, range(2))
    files = {f"policy/{name}": content for name, content in small_files(model.module).items()}
    policy = {"init": init, "lora": lora and lora.model_dump()}
    manifest = dataclasses.replace(step_of(world, 2), config={"policy": policy})
    checkpoints = Checkpoints(Path(folder), world, 2)
    checkpoints.save(manifest, {"policy": model}, files)
    checkpoints.finish()
    with model.averaged():
        save_pretrained(model.module, Path(folder) / "saved", world, max_file_bytes=max_file_bytes)
        if lora is not None:
            save_adapters(model.module, Path(folder) / "adapter", world, init)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def policy_of(folder: Path) -> Path:
    return folder / "step-00000002/policy"


@pytest.mark.parametrize(
    ("family", "dtype", "max_file_bytes"),
    [
        ("qwen2", torch.float32, MAX_FILE_BYTES),  # tied embeddings
        ("gpt_neox", torch.float32, 20_000),  # its files name the head otherwise; several files
        ("phi", torch.bfloat16, MAX_FILE_BYTES),  # a head bias
    ],
)
def test_export_is_save_pretrained(
    two_ranks: WorkerGroup, tmp_path: Path, family: str, dtype: torch.dtype, max_file_bytes: int
) -> None:
    init = str(save_tiny(family, tmp_path / "model"))
    two_ranks.run(saved_both_ways, init, str(tmp_path), dtype, max_file_bytes)
    export(policy_of(tmp_path), tmp_path / "out", max_file_bytes=max_file_bytes)
    expected = contents(tmp_path / "saved")
    assert contents(tmp_path / "out") == expected
    parts = sum(name.endswith(".safetensors") for name in expected)
    assert parts == 1 if max_file_bytes == MAX_FILE_BYTES else parts > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_routers_correction_bias_is_exported(two_ranks: WorkerGroup, tmp_path: Path, dtype: torch.dtype) -> None:
    """A buffer that belongs to the weights: no optimizer holds it, and without it the model routes otherwise."""
    init = str(save_tiny("deepseek_v3", tmp_path / "model"))
    two_ranks.run(saved_both_ways, init, str(tmp_path), dtype)
    export(policy_of(tmp_path), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "saved")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    before, after = (load_file(tmp_path / folder / "model.safetensors")[name] for folder in ("model", "out"))
    assert before.abs().min() > 1e-3
    assert torch.equal(after, before)  # no step moves it, and it stays fp32 in a model of bf16


@pytest.mark.parametrize(
    ("dtype", "max_file_bytes", "average"),
    [(torch.float32, 20_000, None), (torch.bfloat16, MAX_FILE_BYTES, 0.5)],
)
def test_adapters_are_merged_as_the_run_merges_them(
    two_ranks: WorkerGroup, tmp_path: Path, dtype: torch.dtype, max_file_bytes: int, average: float | None
) -> None:
    """And written alone as the run writes them; of their moving average where one is kept."""
    init = str(save_tiny("llama", tmp_path / "model"))
    lora = LoraSettings(rank=3, alpha=7.0)
    two_ranks.run(saved_both_ways, init, str(tmp_path), dtype, max_file_bytes, lora, average)
    export(policy_of(tmp_path), tmp_path / "out", max_file_bytes=max_file_bytes)
    assert contents(tmp_path / "out") == contents(tmp_path / "saved")
    assert export_main([str(tmp_path), str(tmp_path / "alone"), "--adapter"]) == 0
    assert contents(tmp_path / "alone") == contents(tmp_path / "adapter")
    export(policy_of(tmp_path), tmp_path / "raw", raw=True, max_file_bytes=max_file_bytes)
    assert (contents(tmp_path / "raw") == contents(tmp_path / "saved")) == (average is None)


def test_adapters_that_are_not_there_or_not_described(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    init = str(save_tiny("llama", tmp_path / "model"))
    two_ranks.run(saved_both_ways, init, str(tmp_path / "without"), torch.float32)
    with pytest.raises(UserError, match=r"holds no adapters: it was trained without policy\.lora"):
        export_adapters(policy_of(tmp_path / "without"), tmp_path / "out")
    two_ranks.run(saved_both_ways, init, str(tmp_path / "with"), torch.float32, MAX_FILE_BYTES, LoraSettings(rank=2))
    manifest = Manifest.read(policy_of(tmp_path / "with").parent)
    text = dataclasses.replace(manifest, config={"policy": {"init": init, "lora": None}}).text()
    (tmp_path / "with/step-00000002/manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"holds adapters, and the manifest beside it no settings of them"):
        export(policy_of(tmp_path / "with"), tmp_path / "out")


def test_shards_that_are_not_all_there(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    torch.save({"param_shapes": []}, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="holds no shards of ranks 0 to 0"):
        export(tmp_path, tmp_path / "out")
    torch.save({}, tmp_path / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    with pytest.raises(UserError, match="holds no shards of ranks 0 to 1"):
        export(tmp_path, tmp_path / "out")
