"""What a run leaves behind: metrics.jsonl, samples.jsonl, left_out.txt, and the dashboards of accelerate's trackers.

Build a `Tracker` on rank 0 only. Lines are written out as they come, so that a run that dies can be read up to its end.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gearshift.errors import UserError
from gearshift.launch.config import save
from gearshift.launch.dashboards import Dashboard
from gearshift.rlhf.settings import Config, PpoConfig, PretrainConfig

LEFT_OUT = "left_out.txt"


class Tracker:
    """The writer of one run folder. What an earlier run wrote there as it went is removed, so that no two are mixed;
    a run that is resumed goes on in the same files.

    Its results (model/, systems.json ...) stay until this run's, which replace them.
    """

    def __init__(self, folder: str | Path, trackers: Sequence[str], config: Config):
        """Creates the folder and writes config.yaml. `trackers`: accelerate's names. Raises UserError."""
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not _resumes(config):
                _clear(self.folder)
            mode = "a" if _resumes(config) else "w"
            self._metrics = (self.folder / "metrics.jsonl").open(mode, encoding="utf-8")
            self._samples = (self.folder / "samples.jsonl").open(mode, encoding="utf-8")
            (self.folder / LEFT_OUT).unlink(missing_ok=True)  # every start reads its rows anew
        except OSError as error:
            raise UserError(f"run.folder: {folder} cannot be written: {error.strerror}") from None
        save(config, self.folder / "config.yaml")
        self._dashboards = [Dashboard(name, self.folder, config) for name in trackers]

    def keep_until(self, step: int) -> None:
        """Lines of later steps go: the run was resumed from before them."""
        self._metrics = _cut(self._metrics, step)
        self._samples = _cut(self._samples, step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line `{"step": step, name: value, ...}`; a value that is not finite is written as null."""
        values = {name: float(value) for name, value in metrics.items()}
        _write(self._metrics, {"step": step, **{k: v if math.isfinite(v) else None for k, v in values.items()}})
        for dashboard in self._dashboards:
            dashboard.log(step, values)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """One line `{"step": step, ...row}` a row: prompt, response, score, kl, finished."""
        for row in rows:
            _write(self._samples, {"step": step, **row})
        for dashboard in self._dashboards:
            dashboard.samples(step, rows)

    def left_out(self, field: str, rows: Mapping[str, Sequence[str]]) -> None:
        """One line `field<TAB>reason<TAB>file:line` for each row that is not used."""
        lines = [f"{field}\t{reason}\t{row}\n" for reason, named in rows.items() for row in named]
        if lines:
            with (self.folder / LEFT_OUT).open("a", encoding="utf-8") as file:
                file.writelines(lines)

    def close(self) -> None:
        for dashboard in self._dashboards:
            dashboard.close()
        self._metrics.close()
        self._samples.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _resumes(config: Config) -> bool:
    return isinstance(config, PretrainConfig | PpoConfig) and config.checkpoint.resumes


def _cut(file: Any, step: int) -> Any:
    """The file without lines of later steps (and without a half line of a run that was killed), open to write on."""
    path = Path(file.name)
    file.close()
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        aside = path.with_name(f".{path.name}.writing")
        aside.write_text("".join(kept), encoding="utf-8")
        os.replace(aside, path)
    return path.open("a", encoding="utf-8")


def _clear(folder: Path) -> None:
    """Remove an earlier run's dashboards, report and profile, which the new run's files would join, not replace."""
    if not (folder / "metrics.jsonl").is_file():
        return  # no run was here: whatever else is, is not ours
    for name in ("tensorboard", "report", "profile"):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    for name in ("report.html", "profile.md"):
        (folder / name).unlink(missing_ok=True)


def _write(file: Any, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    file.flush()
