"""Parameters that lie in a folder in several parts: the experts of a mixture, one by one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gearshift.engine.loading import build_on_meta
from gearshift.engine.weights import SafetensorsFolder, persistent_buffers
from gearshift.errors import UserError
from tests.models import save_tiny, tiny_config

EXPERT = "model.layers.1.block_sparse_moe.experts"


def opened(family: str, folder: Path) -> tuple[SafetensorsFolder, Any]:
    from transformers import AutoModelForCausalLM

    model = build_on_meta(AutoModelForCausalLM, tiny_config(family), torch.float32)
    return SafetensorsFolder(folder, model), model


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_every_parameter_is_what_transformers_loads(tmp_path: Path, family: str) -> None:
    """With more than ten experts too, whose names sort before the second's."""
    from transformers import AutoModelForCausalLM

    folder, model = opened(family, save_tiny(family, tmp_path))
    folder.check(model)
    own = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, parameter in own.named_parameters():
        assert torch.equal(folder.read(name), parameter), name


def test_mixtrals_experts_lie_one_by_one(tmp_path: Path) -> None:
    """What the tests of this file stand on."""
    save_tiny("mixtral", tmp_path)
    assert f"{EXPERT}.3.w2.weight" in load_file(tmp_path / "model.safetensors")


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    folder = rewritten(save_tiny("mixtral", tmp_path), lambda tensors: tensors.pop(f"{EXPERT}.3.w1.weight"))
    weights, model = opened("mixtral", folder)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj cannot be put together from 7"):
        weights.check(model)


def test_an_expert_too_few(tmp_path: Path) -> None:
    folder = rewritten(save_tiny("mixtral", tmp_path), lambda tensors: tensors.pop(f"{EXPERT}.3.w2.weight"))
    weights, model = opened("mixtral", folder)
    says = r"model\.layers\.1\.mlp\.experts\.down_proj has shape \[3, 32, 48\], the model's config says \[4, 32, 48\]"
    with pytest.raises(UserError, match=says):
        weights.check(model)


def test_the_buffers_that_belong_to_the_weights(tmp_path: Path) -> None:
    """DeepSeek's correction of its router is one; frequencies of rotary embeddings are not."""
    folder, model = opened("deepseek_v3", save_tiny("deepseek_v3", tmp_path))
    names = [name for name, _ in persistent_buffers(model)]
    assert names == ["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert folder.read(names[0]).abs().min() > 0
