"""Ways to train what does not fit into a GPU's memory: each gives the run that would have been without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import CausalModel, TokenBatch, Training, World
from gearshift.errors import SettingError
from gearshift.launch.config import validate
from gearshift.launch.ppo_checks import check_ppo
from gearshift.rlhf.language import language_loss
from gearshift.rlhf.ppo import ppo
from gearshift.rlhf.ppo_data import PpoData
from gearshift.rlhf.ppo_models import load_models
from tests.models import save_tiny
from tests.rlhf.tiny import Recorder, changed, ppo_values
from tests.worker_group import WorkerGroup

ITERATIONS, BATCH = 2, 8
HOST = {"device": "cpu"}
WAYS: dict[str, dict[str, Any]] = {
    "checkpointing": {"optimizer": {"gradient_checkpointing": True}},
    "optimizer on the host": {"deepspeed": {"zero_optimization": {"offload_optimizer": HOST}}},
    "weights on the host": {"deepspeed": {"zero_optimization": {"offload_param": HOST, "offload_optimizer": HOST}}},
    "frozen ones on the host": {"reference": {"offload": True}, "reward": {"offload": True}},
    "optimizer aside": {"rollout": {"offload_optimizer": True, "keep_weights": False}},
    "all": {
        "optimizer": {"gradient_checkpointing": True},
        "deepspeed": {"zero_optimization": {"offload_param": HOST, "offload_optimizer": HOST}},
        "reference": {"offload": True},
        "reward": {"offload": True},
        "rollout": {"keep_weights": False},
    },
}


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ppo = {"episodes": ITERATIONS * BATCH, "batch_size": BATCH, "minibatches": 2, "epochs": 2, "warmup_iterations": 0}
    folder = tmp_path_factory.mktemp("fitting")
    return ppo_values(folder, ppo=ppo, ptx={"coef": 3.5}, checkpoint={"every": 0})


def metrics_of(world: World, values: dict[str, Any]) -> list[dict[str, float]]:
    config: Any = validate("ppo", values)
    report = Recorder()
    ppo(config, report)
    timed = ("timing/", "throughput/", "memory/")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in report.metrics]


@pytest.fixture(scope="module")
def plain(two_ranks: WorkerGroup, values: dict[str, Any]) -> list[dict[str, float]]:
    return list(two_ranks.run(metrics_of, values)[0])


@pytest.mark.parametrize("way", WAYS)
def test_every_loss_is_the_same(
    two_ranks: WorkerGroup, values: dict[str, Any], plain: list[dict[str, float]], tmp_path: Path, way: str
) -> None:
    found = two_ranks.run(metrics_of, changed(values, run={"folder": str(tmp_path / "run")}, **WAYS[way]))[0]
    assert len(found) == len(plain) == ITERATIONS
    for row, expected in zip(found, plain, strict=True):
        assert set(row) == set(expected)
        for name, value in row.items():
            assert value == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


def asked_of(world: World, values: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    """Of each model: whether activations are computed again, and where DeepSpeed is told to keep its weights."""
    config: Any = validate("ppo", values)
    models = load_models(config, world, PpoData.load(config, world, Recorder()))
    found = {}
    for name in ("policy", "critic", "reference", "reward_model"):
        model: Any = getattr(models, name)
        offload = getattr(model.engine.zero_offload_param(), "device", None)
        found[name] = bool(model.module.is_gradient_checkpointing), str(offload)
    return found


def test_what_is_set_reaches_the_models_that_it_names(two_ranks: WorkerGroup, values: dict[str, Any]) -> None:
    """Equal losses alone would not show that."""
    again = two_ranks.run(asked_of, changed(values, **WAYS["checkpointing"]))[0]
    assert [name for name, found in again.items() if found[0]] == ["policy", "critic"]
    for section, name in (("reference", "reference"), ("reward", "reward_model")):
        offloaded = two_ranks.run(asked_of, changed(values, **{section: {"offload": True}}))[0]
        assert [name for name, found in offloaded.items() if "cpu" in found[1]] == [name]


def kept_for_backward(world: World, init: str, again: bool) -> tuple[float, float, int]:
    """The loss, the gradient's norm, and the bytes of activations that the forward leaves for the backward pass."""
    training = Training(1e-2, gradient_checkpointing=again)
    how: dict[str, Any] = {"dtype": torch.float32, "micro_batch_size": 4, "residual_dropout": 0.2}
    model = CausalModel.load(init, world, training=training, **how)
    parameters = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    text = torch.arange(4 * 33).view(4, 33) % 131
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sums = model.accumulate(language_loss, TokenBatch(text[:, :-1].contiguous(), text[:, 1:].contiguous()))
    return float(sums["loss"]), model.step(), sum(kept.values())


def test_activations_are_computed_again(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    """To the same loss and gradient, dropout included."""
    init = str(save_tiny("llama", tmp_path / "model"))
    whole, again = (two_ranks.run(kept_for_backward, init, way)[0] for way in (False, True))
    assert again[:2] == whole[:2]
    assert 0 < again[2] < whole[2] / 2, (again[2], whole[2])


def test_what_would_do_nothing_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    lora: Any = validate("ppo", changed(values, policy={"lora": {"rank": 2}}, reference={"offload": True}))
    with pytest.raises(SettingError, match=r"^reference\.offload: with policy\.lora the reference is the policy"):
        check_ppo(lora, 2)
    other: Any = validate(
        "ppo", changed(values, policy={"lora": {"rank": 2}}, reference={"init": "x", "offload": True})
    )
    check_ppo(other, 2)
