"""What `gearshift bench` alone can have wrong, before any process starts."""

from __future__ import annotations

import os
from pathlib import Path

from gearshift.errors import SettingError
from gearshift.rlhf.settings import BenchConfig, CriticSettings


def check_bench(config: BenchConfig) -> None:
    """Raises SettingError for models that do not go together, and for a file of figures that cannot be written."""
    random = config.policy.init == "config"
    if random and not config.all_of_one_shape:
        raise SettingError(
            "reward.init",
            f"{config.reward.init} needs a policy that is not random: name one (--model FOLDER), or leave this out",
        )
    if config.all_of_one_shape:
        _check_one_shape(config)
    if random:
        _check_random(config)
    if config.bench.out is not None:
        _check_out(config.bench.out)


def _check_one_shape(config: BenchConfig) -> None:
    for field, told in (
        ("critic.init", config.critic.init != CriticSettings().init),
        ("reference.init", config.reference.init != "policy"),
        ("reward.chat_template", config.reward.chat_template),
    ):
        if told:
            raise SettingError(field, "with reward.init: policy all models are of the policy's shape: leave it out")


def _check_random(config: BenchConfig) -> None:
    """A random model has no tokenizer that could read texts."""
    for field, told in (
        ("data.train", config.data.train),
        ("data.tokenizer", config.data.tokenizer),
        ("ptx.data", config.ptx.data),
    ):
        if told:
            raise SettingError(
                field, "a random model reads random tokens: name a model (--model FOLDER), or leave it out"
            )
    # Imported here: it takes seconds, which no other command should spend.
    from gearshift.rlhf.new_model import try_new_model

    try_new_model(config.policy.config or {})


def _check_out(out: str) -> None:
    path = Path(out)
    if path.is_dir():
        raise SettingError("bench.out", f"{out} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise SettingError("bench.out", f"there is no folder {path.parent} (relative to {Path.cwd()})")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise SettingError("bench.out", f"{out} cannot be written")
