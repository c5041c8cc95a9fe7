"""What the trackers hold after a few steps: curves, the config, and samples as tables. Nothing goes over a network."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gearshift.launch.config import load
from gearshift.launch.dashboards import markdown, settings_of
from gearshift.launch.tracking import Tracker
from tests.run_folder import unnamed

from .conftest import example, write

ROW = {"prompt": "a | b\n<c>", "response": " vier\u00e9", "score": 1.0, "kl": 0.123456, "finished": True}


def test_samples_are_a_table_in_tensorboard(here: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker("runs/ppo", ["tensorboard"], load("ppo", write(example("ppo")))) as tracker:
        tracker.samples(3, [ROW, ROW])
        tracker.samples(4, [])
    events = EventAccumulator("runs/ppo/tensorboard").Reload()
    (event,) = events.Tensors("samples/text_summary")
    assert event.step == 3
    assert event.tensor_proto.string_val[0].decode().splitlines() == [
        "| prompt | response | score | kl | finished |",
        "| --- | --- | --- | --- | --- |",
        *["| a &#124; b<br>&lt;c&gt; |  vier\u00e9 | 1 | 0.1235 | True |"] * 2,
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert markdown(["a"], []) == "| a |\n| --- |"


# In processes of their own: wandb and mlflow start services and threads that stay until the process ends.
TRACK = """
import sys
from gearshift.launch.config import load
from gearshift.launch.tracking import Tracker
with Tracker("runs/ppo", [sys.argv[1]], load("ppo", "config.yaml")) as tracker:
    for step in (1, 2):
        tracker.samples(step, [{"prompt": "p", "response": "r", "score": 0.5 * step}])
        tracker.log(step, {"objective/kl": 0.25 * step})
"""


def tracked(here: Path, name: str, **variables: str) -> Path:
    """The run folder after two steps with this tracker, in a process."""
    write(example("ppo"))
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "HOME": str(here), "PYTHONPATH": path, **variables}
    command = [sys.executable, "-c", TRACK, name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return here / "runs/ppo"


def test_weights_and_biases_offline(here: Path) -> None:
    pytest.importorskip("wandb")
    folder = tracked(here, "wandb", WANDB_MODE="offline")
    (run,) = (folder / "wandb").glob("offline-run-*")
    records = wandb_records(next(run.glob("run-*.wandb")))
    (start,) = [record.run for record in records if record.HasField("run")]
    assert (start.project, start.display_name) == ("gearshift", "ppo")
    config = {item.key: json.loads(item.value_json) for record in records for item in record.run.config.update}
    config |= {item.key: json.loads(item.value_json) for record in records for item in record.config.update}
    assert config["ppo.kl.coef"] == 0.02
    steps = [history(record) for record in records if record.HasField("history")]
    assert [(values["_step"], values["objective/kl"]) for values in steps] == [(1, 0.25), (2, 0.5)]
    tables = [json.loads((run / "files" / values["samples.path"]).read_text()) for values in steps]
    assert [table["data"] for table in tables] == [[["p", "r", 0.5]], [["p", "r", 1.0]]]
    assert tables[0]["columns"] == ["prompt", "response", "score"]
    assert not [path for path in here.iterdir() if "wandb" in path.name]  # all of it is in the run folder
    assert unnamed(folder) == []


def wandb_records(path: Path) -> list[Any]:
    """What an offline run's file holds: LevelDB's log format, after seven bytes of wandb's own.

    Blocks of 32 KiB; each piece has a checksum (4 bytes), its length (2) and its kind (1: whole, 2 to 4: first, middle,
    last of a record).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, records, pieces = path.read_bytes(), 7, [], b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        pieces += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            records.append(Record())
            records[-1].ParseFromString(pieces)
            pieces = b""
    return records


def history(record: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def test_mlflow_in_the_run_folder(here: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    folder = tracked(here, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("gearshift").experiment_id])
    assert run.info.run_name == "ppo"
    assert run.data.params["ppo.kl.coef"] == "0.02"
    curve = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "objective/kl")]
    assert curve == [(1, 0.25), (2, 0.5)]
    (table,) = folder.glob("mlflow/artifacts/**/samples/step-00000002.json")
    assert json.loads(table.read_text()) == {"columns": ["prompt", "response", "score"], "data": [["p", "r", 1.0]]}
    assert not [path for path in here.iterdir() if "mlflow" in path.name or "mlruns" in path.name]
    assert unnamed(folder) == []


def test_files_that_the_page_does_not_name_are_found(tmp_path: Path) -> None:
    for name in ("config.yaml", "model/config.json", "model/other.bin", "other.txt", "checkpoints/other", "best/a/b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert unnamed(tmp_path) == ["best/a/b", "checkpoints/other", "model/other.bin", "other.txt"]


def test_settings_are_numbers_and_text(here: Path) -> None:
    settings = settings_of(load("ppo", write(example("ppo"))))
    assert settings["ppo.kl.coef"] == 0.02
    assert settings["data.train"] == "['prompts.jsonl']"
    assert settings["run.ranks"] == "None"
    assert settings["deepspeed"] == "{}"
