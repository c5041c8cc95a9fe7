"""A checkpoint's shards as a folder: what `save_pretrained` of the same weights writes, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gearshift.engine import CausalModel, Training, World
from gearshift.engine.checkpoints.exporting import export
from gearshift.engine.checkpoints.writing import Checkpoints
from gearshift.engine.saving import MAX_FILE_BYTES, save_pretrained, small_files
from gearshift.errors import UserError
from tests.models import save_tiny
from tests.worker_group import WorkerGroup

from .test_writing import step_of, train


def saved_both_ways(world: World, init: str, folder: str, dtype: torch.dtype, max_file_bytes: int) -> None:
    training = Training(1e-2)
    model = CausalModel.load(init, world, dtype=dtype, micro_batch_size=2, training=training)
    train(world, {"policy": model}, range(2))
    files = {f"policy/{name}": content for name, content in small_files(model.module).items()}
    Checkpoints(Path(folder), world, 2).save(step_of(world, 2), {"policy": model}, files)
    save_pretrained(model.module, Path(folder) / "saved", world, max_file_bytes=max_file_bytes)


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
    export(tmp_path / "step-00000002/policy", tmp_path / "out", max_file_bytes=max_file_bytes)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected
    parts = sum(name.endswith(".safetensors") for name in expected)
    assert parts == 1 if max_file_bytes == MAX_FILE_BYTES else parts > 3


def test_shards_that_are_not_all_there(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    torch.save({"param_shapes": []}, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="holds no shards of ranks 0 to 0"):
        export(tmp_path, tmp_path / "out")
    torch.save({}, tmp_path / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    with pytest.raises(UserError, match="holds no shards of ranks 0 to 1"):
        export(tmp_path, tmp_path / "out")
