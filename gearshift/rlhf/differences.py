"""A checkpoint's config against the one that it is resumed with, field by field. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gearshift.engine.checkpoints.manifest import Manifest
from gearshift.errors import SettingError
from gearshift.rlhf.settings import PpoConfig, PretrainConfig

# Another value would make the checkpoint's state mean something else: the models' shapes, the tokens, which rows the
# cursors point at, how many of them a step takes.
MEANING = (
    "policy",
    "critic.init",
    "reference",
    "reward",
    "data",
    "run.seed",
    "run.dtype",
    "train.batch_size",
    "train.pairs",
    "train.pretraining",
    "train.pretraining_fraction",
    "ppo.advantage",
    "ppo.answers",
    "ppo.batch_size",
    "ppo.minibatches",
    "ppo.epochs",
    "ptx.data",
    "ptx.max_tokens",
    "ptx.examples_per_episode",
    "optimizer.name",
)
# Read by no step: where the run writes, and how it was started.
SILENT = ("run.folder", "run.overwrite", "run.ranks", "run.profile", "checkpoint")
FREE = ("data.validation",)


def command_of(config: PretrainConfig | PpoConfig) -> str:
    """ "ppo" for a PpoConfig."""
    return type(config).__name__.removesuffix("Config").lower()


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(field, saved value, present value) of every field that differs; None where one of them lacks it."""
    before, after = flat(saved), flat(now)
    for field in sorted(before.keys() | after.keys()):
        if before.get(field) != after.get(field) and not _under(field, SILENT):
            yield field, before.get(field), after.get(field)


def require_same_run(manifest: Manifest, config: PretrainConfig | PpoConfig) -> None:
    """Raises SettingError for the first difference that would change what the checkpoint's state means."""
    if manifest.command != command_of(config):
        raise SettingError(
            "checkpoint.resume",
            f"the checkpoint is of gearshift {manifest.command}, not of gearshift {command_of(config)}",
        )
    for field, before, after in differences(manifest.config, config.model_dump(mode="json")):
        if _under(field, MEANING) and not _under(field, FREE):
            raise SettingError(
                field, f"{after}, but the checkpoint was made with {before}: it cannot go on with another value"
            )


def what_differs(
    manifest: Manifest, config: PretrainConfig | PpoConfig, versions: Mapping[str, str], ranks: int
) -> Iterator[str]:
    """A line for every difference that a run may go on with: ranks, fields, then versions of libraries."""
    if manifest.world_size != ranks:
        yield f"ranks: was {manifest.world_size}, is {ranks}: the same run, sums rounded in another order"
    for field, before, after in differences(manifest.config, config.model_dump(mode="json")):
        yield f"{field}: was {before}, is {after}"
    for name, version in versions.items():
        if manifest.versions.get(name) != version:
            yield f"{name} {version}, was {manifest.versions.get(name)}: other versions may round differently"


def _under(field: str, names: tuple[str, ...]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in names)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"ppo": {"clip": 0.2}} -> {"ppo.clip": 0.2}; a section without fields is a value itself."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
