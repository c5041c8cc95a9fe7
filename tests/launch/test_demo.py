"""The demo's stages fit together: what one reads, an earlier one has made."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from gearshift.launch.demo import FOLDER, Stage, _start_afresh, stages


def config_of(stage: Stage) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((files("gearshift.launch.demo") / f"{stage.config}.yaml").read_text())
    for key, value in stage.settings.items():
        *sections, name = key.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = f"{FOLDER}/{value}" if name in ("init", "folder") else value
    return values


def models_of(values: Any) -> Iterator[str]:
    """Every folder that a config names under `init`."""
    if isinstance(values, dict):
        for key, value in values.items():
            if key == "init" and str(value).startswith(FOLDER):
                yield value
            yield from models_of(value)


@pytest.mark.parametrize("full", [False, True])
def test_every_stage_writes_its_own_folder_and_reads_what_is_there(full: bool) -> None:
    made: list[str] = []
    for stage in stages(full):
        values = config_of(stage)
        assert values["run"]["folder"] == f"{FOLDER}/{stage.name}"
        assert set(models_of(values)) <= {f"{folder}/model" for folder in made}
        made.append(values["run"]["folder"])
    assert len(set(made)) == len(made)


def test_which_systems_are_compared() -> None:
    four, seven = (config_of(stages(full)[-1])["systems"] for full in (False, True))
    assert list(four) == ["base", "sft", "ppo", "ppo-ptx"]
    assert list(seven)[:7] == ["base", "prompted", "flan", "t0", "sft", "ppo", "ppo-ptx"]


def test_both_comparisons_are_of_the_same_prompts_and_seeds() -> None:
    four, seven = (config_of(stages(full)[-1]) for full in (False, True))
    del four["systems"], seven["systems"], seven["compare"]["selection"]
    assert four == seven


def test_a_second_demo_takes_the_place_of_a_full_one(tmp_path: Path) -> None:
    for name in ("world", "t0", "compare", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    _start_afresh(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
