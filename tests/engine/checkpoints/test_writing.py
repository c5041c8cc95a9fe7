"""Checkpoints of a ZeRO-3 model on two ranks: bit for bit, all or nothing, and told by all when one cannot write."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import CausalModel, TokenBatch, Training, World
from gearshift.engine.checkpoints import files
from gearshift.engine.checkpoints.manifest import Manifest
from gearshift.engine.checkpoints.reading import newest, steps
from gearshift.engine.checkpoints.writing import Checkpoints, versions
from gearshift.engine.settings import LoraSettings
from gearshift.errors import UserError
from gearshift.rlhf.language import language_loss
from tests.models import save_tiny
from tests.worker_group import WorkerGroup

MODELS = ("policy", "critic")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("model")))


def build(world: World, init: str, dtype: torch.dtype, lora: LoraSettings | None = None) -> dict[str, CausalModel]:
    training = Training(1e-2, schedule=lambda step: 1 / (step + 1))
    settings: dict[str, Any] = {"dtype": dtype, "micro_batch_size": 2, "training": training, "lora": lora}
    return {name: CausalModel.load(init, world, **settings) for name in MODELS}


def train(world: World, models: dict[str, CausalModel], steps: range) -> list[float]:
    """Losses and gradient norms of some steps; step n reads batch n."""
    found = []
    for step in steps:
        for number, model in enumerate(models.values()):
            generator = torch.Generator().manual_seed(100 * step + 10 * number + world.rank)
            text = torch.randint(0, 131, (3, 9), generator=generator)
            sums = model.accumulate(language_loss, TokenBatch(text[:, :-1].contiguous(), text[:, 1:].contiguous()))
            found += [float(sums["loss"]), model.step(), float(torch.rand(1))]
    return found


def step_of(world: World, step: int) -> Manifest:
    return Manifest("ppo", step, world.size, 1, {}, {}, versions())


def masters(models: dict[str, CausalModel]) -> list[torch.Tensor]:
    """Weights, fp32 masters and moments of this rank."""
    tensors = []
    for model in models.values():
        tensors += [p.ds_tensor.detach().clone() for p in model.module.parameters()]
        tensors += [group.detach().clone() for group in model.engine.optimizer.fp32_partitioned_groups_flat]
        for state in model.engine.optimizer.optimizer.state.values():
            tensors += [value.clone() for value in state.values() if torch.is_tensor(value)]
    return tensors


def interrupted(
    world: World, init: str, folder: str, dtype: torch.dtype, lora: LoraSettings | None = None
) -> tuple[list[float], list[float], bool]:
    """Five steps, saved after two; and three more from there by models built anew."""
    models, checkpoints = build(world, init, dtype, lora), Checkpoints(Path(folder), world, 2)
    train(world, models, range(2))
    checkpoints.save(step_of(world, 2), models)
    whole = train(world, models, range(2, 5))
    checkpoints.finish()
    again = build(world, init, dtype, lora)
    step, problems = checkpoints.newest(refuse_damaged=True)
    assert problems == []
    checkpoints.load(step, again)
    resumed = train(world, again, range(2, 5))
    assert [m.steps for m in again.values()] == [5, 5]
    assert again["policy"].learning_rate == models["policy"].learning_rate
    return whole, resumed, same(masters(models), masters(again))


def trained_meanwhile(world: World, init: str, folder: str) -> tuple[list[bool], list[float], list[float], bool]:
    """Five steps, the second of them written in the background until the fifth is done; three more from there.

    Whether the step was there: after a poll while it was being written, and after one when it had been.
    """
    models = build(world, init, torch.float32)
    checkpoints, done = Checkpoints(Path(folder), world, 2, background=True), threading.Event()
    checkpoints.save(step_of(world, 1), models)  # so that copies are made where others lie
    checkpoints.close()
    train(world, models, range(2))
    files.hook = lambda operation, path: None if operation == "folder" else _wait(done)
    checkpoints.save(step_of(world, 2), models)
    whole = train(world, models, range(2, 5))
    there = []
    checkpoints.poll()
    there.append(steps(Path(folder)) == [1, 2])
    done.set()
    checkpoints.finish()
    files.hook = None
    there.append(steps(Path(folder)) == [1, 2])
    again = build(world, init, torch.float32)
    checkpoints.load(checkpoints.newest(refuse_damaged=True)[0], again)
    return there, whole, train(world, again, range(2, 5)), same(masters(models), masters(again))


def _wait(done: threading.Event) -> None:
    assert done.wait(timeout=100)


def test_steps_are_taken_while_one_is_written(two_ranks: WorkerGroup, model: str, tmp_path: Path) -> None:
    """What is written is what was there when the save began, also where an earlier copy lay."""
    for there, whole, resumed, equal in two_ranks.run(trained_meanwhile, model, str(tmp_path)):
        assert there == [False, True]
        assert whole == resumed
        assert equal


def started_again(world: World, init: str, folder: str) -> list[int]:
    """The steps that are there when a run starts over in the folder of a longer one, and saves."""
    models, checkpoints = build(world, init, torch.float32), Checkpoints(Path(folder), world, 1)
    for step in (20, 3):
        checkpoints.clear()
        checkpoints.save(step_of(world, step), models)
        checkpoints.close()
    return steps(Path(folder))


def test_a_run_that_starts_again_has_its_own_checkpoints(two_ranks: WorkerGroup, model: str, tmp_path: Path) -> None:
    assert two_ranks.run(started_again, model, str(tmp_path / "checkpoints")) == [[3], [3]]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_model_goes_on_bit_for_bit(
    two_ranks: WorkerGroup, model: str, tmp_path: Path, dtype: torch.dtype
) -> None:
    for whole, resumed, equal in two_ranks.run(interrupted, model, str(tmp_path), dtype):
        assert whole == resumed
        assert equal
    names = {str(p.relative_to(tmp_path / "step-00000002")) for p in tmp_path.rglob("*.*")}
    prefix = "bf16_" if dtype == torch.bfloat16 else ""
    for rank in range(2):
        assert f"critic/{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" in names
        assert f"policy/zero_pp_rank_{rank}_mp_rank_00_model_states.pt" in names
    assert not any(name.endswith(".py") for name in names)  # DeepSpeed's scripts that unpickle anything


def test_adapters_go_on_bit_for_bit(two_ranks: WorkerGroup, model: str, tmp_path: Path) -> None:
    lora = LoraSettings(rank=2)
    for whole, resumed, equal in two_ranks.run(interrupted, model, str(tmp_path), torch.float32, lora):
        assert whole == resumed
        assert equal


def failing(world: World, init: str, folder: str, rank: int, operation: str, background: bool) -> str:
    """What a save says when the disk of one rank refuses an operation."""
    models, checkpoints = build(world, init, torch.float32), Checkpoints(Path(folder), world, 2, background)
    checkpoints.save(step_of(world, 1), models)
    checkpoints.finish()

    def refuse(what: str, path: Path) -> None:
        if what == operation and world.rank == rank and "critic" in str(path):
            raise OSError(28, os.strerror(28), str(path))

    files.hook = refuse
    try:
        checkpoints.save(step_of(world, 2), models)
        checkpoints.finish()
    except UserError as error:
        return str(error)
    finally:
        files.hook = None
    return ""


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("rank", "operation"), [(1, "write"), (0, "flush"), (1, "create"), (0, "folder")])
def test_every_rank_tells_what_one_could_not_write(
    two_ranks: WorkerGroup, model: str, tmp_path: Path, rank: int, operation: str, background: bool
) -> None:
    told = two_ranks.run(failing, model, str(tmp_path), rank, operation, background)
    assert told[0].startswith(f"{tmp_path}/.step-00000002.writing/critic")
    assert "cannot be written: No space left on device; a checkpoint takes about " in told[0]
    assert told[0].split(", ")[0] == told[1].split(", ")[0]  # what is free may change meanwhile
    assert newest(tmp_path, refuse=True)[0].name == "step-00000001"
    assert not list(tmp_path.glob(".step*"))


def purging(world: World, init: str, folder: str) -> tuple[list[str | None], list[int], list[int]]:
    """Two saves of which one step stays, the disk refusing to let the older one go; and a third with the disk well:
    what is told, and the steps that are there under any name."""
    models, checkpoints = build(world, init, torch.float32), Checkpoints(Path(folder), world, 1)
    checkpoints.save(step_of(world, 1), models)

    def refuse(what: str, path: Path) -> None:
        if what == "remove":
            raise OSError(39, os.strerror(39), str(path))

    files.hook = refuse
    checkpoints.save(step_of(world, 2), models)
    checkpoints.close()
    files.hook = None
    told, before = [checkpoints.not_removed(), checkpoints.not_removed()], there(folder)
    checkpoints.save(step_of(world, 3), models)
    checkpoints.close()
    return told, before, there(folder)


def there(folder: str) -> list[int]:
    return sorted(
        int(path.name.strip(".").split(".")[0].removeprefix("step-")) for path in Path(folder).glob("*step-*")
    )


def test_a_run_folder_that_is_gone_is_told_like_a_full_disk(tmp_path: Path) -> None:
    folder = tmp_path / "gone" / "run" / "checkpoints"
    checkpoints = Checkpoints(folder, World(0, 1, 0, 1, torch.device("cpu")), keep=1)
    with pytest.raises(UserError, match="no such folder; a checkpoint takes about 7 bytes in"):
        checkpoints._fail(folder / ".step-00000001.writing", "no such folder", 7)


def test_what_cannot_be_removed_ends_nothing(two_ranks: WorkerGroup, model: str, tmp_path: Path) -> None:
    """It is told once, and gone after the next save."""
    (told, before, after), (silent, *_) = two_ranks.run(purging, model, str(tmp_path))
    assert told[0] is not None
    assert "Directory not empty" in told[0]
    assert told[1] is None
    assert silent == [None, None]
    assert before == [1, 2]
    assert after == [3]


def save_one(world: World, init: str, folder: str) -> None:
    models = build(world, init, torch.float32)
    train(world, models, range(1))
    checkpoints = Checkpoints(Path(folder), world, 2)
    checkpoints.save(step_of(world, 1), models)
    checkpoints.finish()


def refused(world: World, init: str, steps: list[Path]) -> list[tuple[str, bool]]:
    """What loading says of each step, its digests being right, and whether the models are as they were."""
    models, found = build(world, init, torch.float32), []
    before = masters(models)
    for step in steps:
        checkpoints = Checkpoints(step.parent, world, 2)
        assert checkpoints.problems(step) == []
        try:
            checkpoints.load(step, models)
        except UserError as error:
            found.append((str(error), same(before, masters(models))))
    return found


def forge(step: Path, name: str, trace: Path) -> None:
    """In place of one file a malicious one, and a manifest to match."""
    from .test_shards import Malicious

    written = Manifest.read(step)
    torch.save({"module": Malicious(trace)}, step / name)
    entry = {"size": (step / name).stat().st_size, "sha256": files.digest(step / name)}
    (step / "manifest.json").write_text(dataclasses.replace(written, files={**written.files, name: entry}).text())


def test_a_malicious_file_with_a_manifest_to_match(two_ranks: WorkerGroup, model: str, tmp_path: Path) -> None:
    """Refused on every rank before any weight changes, also when its digest is right; nothing is executed."""
    two_ranks.run(save_one, model, str(tmp_path))
    names = sorted(Manifest.read(tmp_path / "step-00000001").files)
    assert len(names) == 10
    forged = [tmp_path / f"{number}" / "step-00000001" for number in range(len(names))]
    for step, name in zip(forged, names, strict=True):
        shutil.copytree(tmp_path / "step-00000001", step)
        forge(step, name, tmp_path / "trace")
    for found in two_ranks.run(refused, model, forged):
        for step, name, (told, untouched) in zip(forged, names, found, strict=True):
            assert told.startswith(f"{step / name}: refused, nothing of it was run")
            assert untouched
    assert not (tmp_path / "trace").exists()
