"""A checkpoint read by other ranks than wrote it: every element of every shard where it belongs, bit for bit."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gearshift.engine import CausalModel, Training, World
from gearshift.engine.checkpoints.recutting import Recut, recut
from gearshift.engine.checkpoints.shards import load
from gearshift.engine.checkpoints.writing import Checkpoints
from gearshift.engine.settings import LoraSettings
from tests.models import save_tiny
from tests.worker_group import WorkerGroup

from .test_writing import step_of, train

WAYS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw bf16": {"dtype": torch.bfloat16},
    "sgd": {"training": Training(1e-2, optimizer="sgd")},
    "lora": {"lora": LoraSettings(rank=2)},
    "small groups": {"deepspeed_extra": {"zero_optimization": {"sub_group_size": 1500}}},
}


def cut(whole: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """As ZeRO-3 does: equal shards, the last ones padded."""
    size = -(-len(whole) // ranks)
    return list(torch.cat([whole, whole.new_full((size * ranks - len(whole),), -1.0)]).split(size))


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9))
def test_a_shard_is_that_of_the_whole_parameter(numel: int, old: int, ranks: int) -> None:
    whole = torch.arange(numel, dtype=torch.float64)
    before, expected = cut(whole, old), cut(whole, ranks)
    for rank in range(ranks):
        found = recut(lambda r: before[r], old, numel, rank, ranks)
        assert torch.equal(found, expected[rank].clamp(min=0))


@pytest.mark.parametrize(("old", "ranks", "most"), [(64, 8, 10), (8, 64, 2), (1024, 1000, 3)])
def test_only_the_shards_that_lie_over_it_are_read(old: int, ranks: int, most: int) -> None:
    before = cut(torch.arange(100_003, dtype=torch.float32), old)
    asked: list[int] = []

    def shard(number: int) -> torch.Tensor:
        asked.append(number)
        return before[number]

    for rank in (0, ranks // 2, ranks - 1):
        asked.clear()
        recut(shard, old, 100_003, rank, ranks)
        assert len(asked) <= most


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("model")))


def build(world: World, init: str, way: str) -> dict[str, CausalModel]:
    training = Training(1e-2, schedule=lambda step: 1 / (step + 1), average=0.9)
    settings = {"dtype": torch.float32, "micro_batch_size": 2, "training": training, **WAYS[way]}
    return {"policy": CausalModel.load(init, world, **settings)}


def saved(world: World, init: str, folder: str) -> None:
    """A checkpoint of every way to train, after two steps."""
    for way in WAYS:
        models = build(world, init, way)
        train(world, models, range(2))
        checkpoints = Checkpoints(Path(folder) / way, world, 2)
        checkpoints.save(step_of(world, 2), models)
        checkpoints.finish()


@pytest.fixture(scope="module")
def steps(two_ranks: WorkerGroup, model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    two_ranks.run(saved, model, str(folder))
    return folder


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if torch.is_tensor(value):
        yield path, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from tensors(inner, f"{path}.{name}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from tensors(inner, f"{path}.{number}")


def files(policy: Path, rank: int) -> list[Path]:
    return sorted(policy.glob(f"*zero_pp_rank_{rank}_*.pt"))


def shapes_in(policy: Path) -> Any:
    return load(policy / "zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"]


def optimizer_in(policy: Path) -> Any:
    return load(next(policy.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt")))["optimizer_state_dict"]


def written_by(policy: Path, old: int, ranks: int, shapes: Any, out: Path) -> Path:
    """The files that `ranks` ranks would have, from those of `old`."""
    out.mkdir(parents=True)
    for rank in range(ranks):
        reader = Recut(policy, old, rank, ranks)
        reader._now = shapes
        for path in files(policy, 0):
            name = path.name.replace("rank_0_", f"rank_{rank}_")
            torch.save(reader.load(str(policy / name)), out / name)
    return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("between", [1, 3, 4])
def test_there_and_back_every_file_is_the_same(steps: Path, tmp_path: Path, way: str, between: int) -> None:
    """Two ranks' files cut for one, three and four, and those cut for two again."""
    policy = steps / way / "step-00000002/policy"
    shapes = shapes_in(policy)
    assert len(shapes) > 1 if way == "small groups" else len(shapes) == 1
    other = written_by(policy, 2, between, shapes, tmp_path / "other")
    again = written_by(other, between, 2, shapes, tmp_path / "again")
    for rank in range(2):
        for one, two in zip(files(policy, rank), files(again, rank), strict=True):
            expected, found = dict(tensors(load(one))), dict(tensors(load(two)))
            assert list(found) == list(expected)
            assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_groups_of_other_sizes(steps: Path, tmp_path: Path) -> None:
    """One rank holds more of each parameter than two, so that DeepSpeed makes more groups of a bounded size."""
    policy = steps / "small groups/step-00000002/policy"
    shapes = shapes_in(policy)
    names = {name: shape for group in shapes for name, shape in group.items()}
    alone = [{name: shape} for name, shape in names.items()]
    other = written_by(policy, 2, 1, alone, tmp_path / "other")
    state = optimizer_in(other)
    assert [len(flat) for flat in state["fp32_flat_groups"]] == [math.prod(shape) for shape in names.values()]
    assert state["optimizer_state_dict"]["param_groups"][0]["params"] == list(range(len(names)))
    again = written_by(other, 1, 2, shapes, tmp_path / "again")
    for rank in range(2):
        for one, two in zip(files(policy, rank), files(again, rank), strict=True):
            found, expected = dict(tensors(load(two))), dict(tensors(load(one)))
            assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def read_and_saved(world: World, init: str, folder: str, way: str) -> None:
    models, checkpoints = build(world, init, way), Checkpoints(Path(folder) / way, world, 2)
    step, problems = checkpoints.newest(refuse_damaged=True)
    assert problems == []
    checkpoints.load(step, models)
    assert str(step) not in Path("/proc/self/maps").read_text(), "a file is still mapped"
    assert models["policy"].steps == 2
    assert models["policy"].learning_rate == pytest.approx(1e-2 / 3 if way != "sgd" else 1e-2)
    again = Checkpoints(Path(folder) / f"{way} by {world.size}", world, 2)
    again.save(step_of(world, 2), models)
    again.finish()
    train(world, models, range(2, 4))
    states = models["policy"].engine.optimizer.optimizer.state.values()
    assert {float(state["step"]) for state in states if "step" in state} in (set(), {4.0})


@pytest.mark.parametrize("way", WAYS)
def test_deepspeed_takes_it(one_rank: WorkerGroup, model: str, steps: Path, way: str) -> None:
    """One rank reads what two have written; what it then writes itself is what was cut for it."""
    one_rank.run(read_and_saved, model, str(steps), way)
    before, after = steps / way / "step-00000002/policy", steps / f"{way} by 1/step-00000002/policy"
    shapes = shapes_in(after)
    reader = Recut(before, 2, 0, 1)
    reader._now = shapes
    for path in files(after, 0):
        expected, found = dict(tensors(reader.load(str(before / path.name)))), dict(tensors(load(path)))
        assert list(found) == list(expected)
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("way", ["adamw", "adamw bf16", "small groups"])
def test_deepspeeds_universal_converter_finds_the_same(steps: Path, tmp_path: Path, way: str) -> None:
    """Weights and moments of every parameter, from the same files."""
    from deepspeed.checkpoint.ds_to_universal import main

    policy, out = steps / way / "step-00000002/policy", tmp_path / "universal/step"
    how = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    main(Namespace(input_folder=str(policy), output_folder=str(out), inject_missing_state=False, **how))
    reader = Recut(policy, 2, 0, 1)
    reader._now = shapes_in(policy)
    state = reader.load(str(next(policy.glob("*rank_0_*optim_states.pt"))))["optimizer_state_dict"]
    for group, shapes in enumerate(reader._now):
        moments = state["optimizer_state_dict"]["state"][group]
        flats = {"fp32": state["fp32_flat_groups"][group], "exp_avg": moments["exp_avg"]}
        flats["exp_avg_sq"], at = moments["exp_avg_sq"], 0
        for name, shape in shapes.items():
            for key, flat in flats.items():
                theirs = torch.load(out / f"zero/{name}/{key}.pt")
                theirs = theirs["param"] if isinstance(theirs, dict) else theirs
                assert torch.equal(flat[at : at + shape.numel()], theirs.flatten()[: shape.numel()]), (name, key)
            at += shape.numel()
