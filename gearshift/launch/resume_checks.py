"""Whether a run may go on from the checkpoint that it names, or start beside those that are there.

Only manifests are read; the ranks read every byte before they load any.
"""

from __future__ import annotations

from pathlib import Path

from gearshift.engine.checkpoints.manifest import NAME, Manifest, folder_name, step_of
from gearshift.engine.checkpoints.reading import steps
from gearshift.engine.checkpoints.settings import FOLDER
from gearshift.errors import SettingError, UserError
from gearshift.rlhf.differences import require_same_run
from gearshift.rlhf.settings import PpoConfig, PretrainConfig


def check_resume(config: PretrainConfig | PpoConfig) -> None:
    """Raises SettingError when nothing is there to resume from, or when it would not be the same run."""
    folder, resume = Path(config.run.folder) / FOLDER, config.checkpoint.resume
    if resume != "auto":
        if not (Path(str(resume)) / NAME).is_file():
            raise SettingError("checkpoint.resume", f"{resume} is no checkpoint: it has no {NAME}")
        _check_place(Path(str(resume)).resolve(), folder.resolve())
        require_same_run(_read(Path(str(resume))), config)
        return
    if not steps(folder):
        raise SettingError("checkpoint.resume", f"auto, but {folder} holds no checkpoint: leave --resume out to start")
    for step in reversed(steps(folder)):
        try:
            manifest = Manifest.read(folder / folder_name(step))
        except UserError:  # the ranks tell it, and take the one before
            continue
        require_same_run(manifest, config)
        return


def _check_place(step: Path, folder: Path) -> None:
    """A run goes on in its own folder, or in one where no other run's checkpoints would be taken for its own."""
    if step.parent != folder:
        if steps(folder):
            raise SettingError(
                "run.folder", f"{folder} holds checkpoints of another run than {step}: choose a new run.folder"
            )
    elif step_of(step.name) is None:
        raise SettingError(
            "checkpoint.resume",
            f"{step} has another name than a step's: call it {folder_name(Manifest.read(step).step)}",
        )


def check_held(config: PretrainConfig | PpoConfig) -> None:
    """Raises SettingError where a part of the state would not be in the checkpoints."""
    zero = config.deepspeed.get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, dict) else None
    if config.checkpoint.every and isinstance(offload, dict) and offload.get("device") == "nvme":
        raise SettingError(
            "checkpoint.every",
            "optimizer state on NVMe lies in files that a checkpoint does not hold: set it to 0, or "
            "deepspeed.zero_optimization.offload_optimizer.device: cpu",
        )


def check_start(config: PretrainConfig | PpoConfig) -> None:
    """Raises SettingError when a run that was not asked to resume would leave checkpoints behind it."""
    folder = Path(config.run.folder) / FOLDER
    if steps(folder) and config.checkpoint.resume is None and not config.run.overwrite:
        raise SettingError(
            "run.folder",
            f"{folder} holds checkpoints of an earlier run: go on with --resume auto, or start again with "
            "--resume never, which removes them",
        )


def _read(step: Path) -> Manifest:
    try:
        return Manifest.read(step)
    except UserError as error:
        raise SettingError("checkpoint.resume", str(error)) from None
