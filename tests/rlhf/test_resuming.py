"""PPO that goes on from a checkpoint does what it would have done: every token, log-prob, reward, loss and weight."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import Episodes, World
from gearshift.engine.checkpoints.manifest import Manifest
from gearshift.engine.checkpoints.reading import steps
from gearshift.errors import SettingError, UserError
from gearshift.launch.config import validate
from gearshift.launch.export import main as export_main
from gearshift.launch.verify import main as verify_main
from gearshift.rlhf.differences import require_same_run, what_differs
from gearshift.rlhf.ppo import Ppo, ppo
from tests.engine.checkpoints.steps import flip
from tests.rlhf.tiny import Recorder, changed, ppo_values
from tests.run_folder import unnamed
from tests.worker_group import WorkerGroup

BATCH, ITERATIONS, SAVED = 8, 4, 2
TIMED = ("timing/", "throughput/", "memory/")


def saved_values(folder: Path) -> dict[str, Any]:
    """PPO-ptx with an adaptive KL coefficient, saved every second iteration; data and models in `folder`."""
    ppo = {
        "episodes": ITERATIONS * BATCH,
        "batch_size": BATCH,
        "minibatches": 2,
        "epochs": 2,
        "warmup_iterations": 3,
        "validate_every": 2,
        "kl": {"coef": 0.1, "target": 0.05, "horizon": 40},
    }
    return ppo_values(folder, ppo=ppo, ptx={"coef": 3.5}, checkpoint={"every": SAVED})


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return saved_values(tmp_path_factory.mktemp("ppo"))


def run_ppo(world: World, values: dict[str, Any]) -> tuple[Recorder, list[dict[str, torch.Tensor]]]:
    """What the run told, and all tensors of every iteration's episodes."""
    config: Any = validate("ppo", values)
    report, seen = Recorder(), []
    check = Ppo.check_finite

    def keep(self: Ppo, episodes: Episodes, number: int) -> None:
        seen.append({f.name: getattr(episodes, f.name) for f in dataclasses.fields(episodes)})
        check(self, episodes, number)

    Ppo.check_finite = keep  # type: ignore[method-assign]
    try:
        ppo(config, report)
    finally:
        Ppo.check_finite = check  # type: ignore[method-assign]
    return report, seen


def without_clocks(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in metrics]


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(two_ranks: WorkerGroup, values: dict[str, Any]) -> list[tuple[Recorder, list[dict[str, torch.Tensor]]]]:
    """The run that nothing interrupts."""
    return two_ranks.run(run_ppo, values, timeout=200)


@pytest.mark.parametrize("at", [SAVED, ITERATIONS])
def test_a_resumed_run_is_the_same_run(
    two_ranks: WorkerGroup, values: dict[str, Any], whole: Any, tmp_path: Path, at: int
) -> None:
    """From the second iteration; and from the last, where only the models are left to be written."""
    before = Path(values["run"]["folder"])
    step = before / f"checkpoints/step-{at:08d}"
    again = changed(values, run={"folder": str(tmp_path / "run")}, checkpoint={"resume": str(step)})
    for (report, seen), (expected, all_seen) in zip(two_ranks.run(run_ppo, again, timeout=200), whole, strict=True):
        assert report.done == at
        assert without_clocks(report.metrics) == without_clocks(expected.metrics[at:])
        assert len(seen) == ITERATIONS - at
        for one, other in zip(seen, all_seen[at:], strict=True):
            assert [name for name in one if not torch.equal(one[name], other[name])] == []
        assert report.rows == [row for row in expected.rows if row["step"] > at]
    found, expected_weights = weights(tmp_path / "run"), weights(before)
    assert set(expected_weights) == {f"{name}/model.safetensors" for name in ("critic", "model", "best/model")}
    # In another folder, where the best model so far is not, a best one is looked for anew: that of the last iteration.
    best = found.pop("best/model/model.safetensors", None)
    assert best == (found["model/model.safetensors"] if at < ITERATIONS else None)
    del expected_weights["best/model/model.safetensors"]
    assert found == expected_weights
    coefs = [row["objective/kl_coef"] for row in whole[0][0].metrics]
    assert len(set(coefs)) == ITERATIONS  # the controller moved, so that its state counts


def best_so_far(metrics: list[dict[str, float]]) -> dict[str, float]:
    scored = [(row["validation/scores"], -step) for step, row in enumerate(metrics, 1) if "validation/scores" in row]
    score, step = max(scored)
    return {"step": -step, "score": score}


def test_what_a_manifest_says(values: dict[str, Any], whole: Any) -> None:
    folder = Path(values["run"]["folder"]) / "checkpoints"
    assert steps(folder) == [SAVED, ITERATIONS]
    manifest = Manifest.read(folder / f"step-{SAVED:08d}")
    metrics = whole[0][0].metrics
    assert manifest.state == {
        "prompts": SAVED * BATCH,
        "pretraining": SAVED * BATCH * 2,
        "kl": metrics[SAVED]["objective/kl_coef"],
        "scores": [0.0, 0.0, 0.0],
        "best": best_so_far(metrics[:SAVED]),
    }
    assert manifest.score == metrics[SAVED - 1]["validation/scores"]
    assert (manifest.world_size, manifest.tp_size) == (2, 2)
    config: Any = validate("ppo", values)
    assert manifest.config == config.model_dump(mode="json")
    require_same_run(manifest, config)
    assert list(what_differs(manifest, config, manifest.versions, 2)) == []


def a_manifest(values: dict[str, Any]) -> Manifest:
    config: Any = validate("ppo", values)
    return Manifest("ppo", 2, 2, 2, config.model_dump(mode="json"), {}, {"torch": "2.13"})


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("run", "seed", 4),
        ("policy", "init", "other"),
        ("data", "train", ["other.jsonl"]),
        ("data", "prompt_template", "{prompt}!"),
        ("ppo", "batch_size", 16),
        ("ppo", "minibatches", 4),
        ("ptx", "max_tokens", 11),
        ("optimizer", "name", "sgd"),
    ],
)
def test_a_change_of_meaning_is_refused(values: dict[str, Any], section: str, name: str, value: Any) -> None:
    config: Any = validate("ppo", changed(values, **{section: {name: value}}))
    with pytest.raises(SettingError, match=rf"^{section}\.{name}: .*, but the checkpoint was made with"):
        require_same_run(a_manifest(values), config)


def test_other_changes_are_listed_field_by_field(values: dict[str, Any]) -> None:
    more = changed(
        values,
        run={"folder": "elsewhere"},
        ppo={"episodes": 80, "micro_batch_size": 4},
        data={"validation": []},
        rollout={"tp_size": 1},
        checkpoint={"every": 1, "resume": "auto"},
    )
    config: Any = validate("ppo", more)
    require_same_run(a_manifest(values), config)
    held_out = values["data"]["validation"]
    assert list(what_differs(a_manifest(values), config, {"torch": "2.14"}, 4)) == [
        "ranks: was 2, is 4: the same run, sums rounded in another order",
        f"data.validation: was {[held_out]}, is []",
        "ppo.episodes: was 32, is 80",
        "ppo.micro_batch_size: was 3, is 4",
        "rollout.tp_size: was 2, is 1",
        "torch 2.14, was 2.13: other versions may round differently",
    ]


def test_another_command_is_refused(values: dict[str, Any]) -> None:
    config: Any = validate("ppo", values)
    sft = dataclasses.replace(a_manifest(values), command="sft")
    with pytest.raises(SettingError, match=r"of gearshift sft, not of gearshift ppo"):
        require_same_run(sft, config)


@pytest.mark.parametrize("name", ["policy", "critic"])
def test_an_exported_model_is_the_one_that_the_run_saved(
    values: dict[str, Any], whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Byte for byte: weights, config, generation config and tokenizer, from the shards of two ranks."""
    run = Path(values["run"]["folder"])
    assert export_main([str(run), str(tmp_path / "out"), "--model", name]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out: {name} of {run}/checkpoints/step-{ITERATIONS:08d}\n"
    saved = run / ("model" if name == "policy" else "critic")
    expected = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected
    assert "tokenizer.json" in expected
    assert export_main([str(run), str(tmp_path / "raw"), "--model", name, "--raw"]) == 0
    raw = (tmp_path / "raw/model.safetensors").read_bytes()
    assert (raw == expected["model.safetensors"]) == (name == "critic"), "of the policy alone an average is kept"
    with pytest.raises(UserError, match="is there already"):
        export_main([str(run), str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"--model: reward is not in .*: it has critic, policy"):
        export_main([str(run), str(tmp_path / "other"), "--model", "reward"])


def test_the_run_folder_holds_what_its_page_says(values: dict[str, Any], whole: Any) -> None:
    run = Path(values["run"]["folder"])
    assert {"best", "checkpoints", "critic", "model"} <= {path.name for path in run.iterdir()}
    assert unnamed(run) == []


def test_verify(values: dict[str, Any], whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(values["run"]["folder"], run)
    assert verify_main([str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["whole", "whole"]
    assert "gearshift ppo, step 2, 2 ranks, " in lines[0]
    assert "validation " in lines[0]
    last = run / f"checkpoints/step-{ITERATIONS:08d}"
    flip(last / "critic/tokenizer.json")
    assert verify_main([str(last)]) == 1
    assert capsys.readouterr().out.startswith(f"{last}/critic/tokenizer.json: is damaged")
    assert verify_main([str(run / "checkpoints/step-00000002")]) == 0
    (run / "checkpoints/latest").unlink()
    assert verify_main([str(run)]) == 1
    assert capsys.readouterr().out.endswith("checkpoints/latest: is missing\n")
    with pytest.raises(UserError, match="holds no checkpoint"):
        verify_main([str(tmp_path)])
    with pytest.raises(UserError, match=r"tokenizer\.json: is damaged"):
        export_main([str(run), str(tmp_path / "out")])
