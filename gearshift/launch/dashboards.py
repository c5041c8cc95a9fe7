"""accelerate's trackers, on rank 0 alone: metrics as curves, samples as tables in those that have tables."""

from __future__ import annotations

import html
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gearshift.rlhf.differences import flat
from gearshift.rlhf.settings import Config

SAMPLES = "samples"


class Dashboard:
    """One of accelerate's trackers, by its `name` there, without the process state that it would build for itself.

    Under DeepSpeed's launcher on CPU that state takes every rank for the main one, and raises the thread count.
    What it writes to disks goes into the run `folder`, but where variables of its own say otherwise.
    """

    def __init__(self, name: str, folder: Path, config: Config):
        from accelerate import tracking

        # Its logger insists on that state too; a plain one does not.
        tracking.logger = logging.getLogger(tracking.__name__)
        self.name = name
        self._tracker = tracking.LOGGER_TYPE_TO_CLASS[name](**_settings(name, folder))
        self._tracker.main_process_only = False
        self._tracker.start()
        if name != "tensorboard":  # which would keep it as a second run
            self._tracker.store_init_configuration(settings_of(config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._tracker.log(dict(values), step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows that have the same names, as a table of the step; nothing in a tracker without tables."""
        if not rows:
            return
        columns = list(rows[0])
        data = [[row[column] for column in columns] for row in rows]
        if self.name == "tensorboard":
            self._tracker.writer.add_text(SAMPLES, markdown(columns, data), global_step=step)
            self._tracker.writer.flush()
        elif self.name == "mlflow":
            import mlflow

            by_column = {column: [row[i] for row in data] for i, column in enumerate(columns)}
            mlflow.log_table(by_column, artifact_file=f"{SAMPLES}/step-{step:08d}.json")
        elif hasattr(self._tracker, "log_table"):  # wandb, clearml
            self._tracker.log_table(SAMPLES, columns=columns, data=data, step=step)

    def close(self) -> None:
        self._tracker.finish()


def _settings(name: str, folder: Path) -> dict[str, Any]:
    """What a tracker is built with."""
    from accelerate import tracking

    if name == "tensorboard":
        return {"run_name": "tensorboard", "logging_dir": str(folder)}  # it writes to logging_dir/run_name
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", "gearshift")
        return {"run_name": project, "name": folder.name, "dir": os.environ.get("WANDB_DIR", str(folder))}
    if name == "mlflow":
        if "MLFLOW_TRACKING_URI" in os.environ:
            return {"experiment_name": "gearshift", "run_name": folder.name}
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder.absolute()}/mlflow/mlflow.db"
        (folder / "mlflow").mkdir(exist_ok=True)
        artifacts = (folder.absolute() / "mlflow/artifacts").as_uri()
        return {"experiment_name": "gearshift", "run_name": folder.name, "logging_dir": artifacts}
    if tracking.LOGGER_TYPE_TO_CLASS[name].requires_logging_directory:
        return {"run_name": folder.name, "logging_dir": str(folder)}
    return {"run_name": folder.name}


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as TensorBoard shows one; whatever stands in a cell is text there."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(_cell(cell) for cell in cells) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *(line(row) for row in rows)])


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))
    return text.replace("|", "&#124;").replace("\r", "").replace("\n", "<br>")


def settings_of(config: Config) -> dict[str, bool | int | float | str]:
    """`section.field` -> value; what is no number or text (a list, None) as text."""
    fields = flat(config.model_dump(mode="json"))
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in fields.items()
    }
