"""The settings of a comparison against each other, before any process starts."""

from __future__ import annotations

from gearshift.errors import SettingError
from gearshift.launch.model_checks import fails, function_problem
from gearshift.rlhf.settings import CompareConfig


def check_comparison(config: CompareConfig) -> None:
    """Raises SettingError for what would not be read, names nothing that is there, or would choose on the test."""
    _check_unread(config)
    _check_checker(config.compare.true_score)
    _check_against(config)
    _check_prefixes(config)


def _check_unread(config: CompareConfig) -> None:
    """What stands in a section that compare shares with ppo, but trains nothing with."""
    for field, value in (
        ("data.train", config.data.train),
        ("ptx.data", config.ptx.data),
        ("ptx.coef", config.ptx.coef),
        ("rollout.offload_optimizer", config.rollout.offload_optimizer),
    ):
        if value:
            raise SettingError(field, "gearshift compare trains nothing, so it would not be read: leave it out")


def _check_checker(name: str | None) -> None:
    """`module:function` can be found; the module itself is imported by the ranks only."""
    if name is not None:
        fails("compare.true_score", function_problem(name))


def _check_against(config: CompareConfig) -> None:
    against = config.compare.against
    if against is not None and against not in config.systems:
        raise SettingError(
            "compare.against", f"{against} is none of the systems: use one of {', '.join(config.systems)}"
        )


def _check_prefixes(config: CompareConfig) -> None:
    """Prefixes are chosen on prompts of their own, or the chosen one would be flattered by the comparison."""
    selection = config.compare.selection
    choosing = [name for name, system in config.systems.items() if system.prefixes]
    for name, system in config.systems.items():
        if config.data.chat_template and (system.prefix or system.prefixes):
            raise SettingError(
                f"systems.{name}.{'prefix' if system.prefix else 'prefixes'}",
                "goes before a prompt, and data.chat_template opens each with marks of its own: leave out one of them",
            )
    for name in choosing:
        if config.systems[name].prefix:
            raise SettingError(f"systems.{name}.prefix", "prefixes are given to choose from: leave out one of the two")
    if choosing and not selection:
        raise SettingError(
            "compare.selection", f"needed with systems.{choosing[0]}.prefixes: sources of prompts to choose on"
        )
    if selection and not choosing:
        raise SettingError("compare.selection", "no system has prefixes to choose from: leave it out")
    for source in selection:
        if source in config.data.validation:
            raise SettingError(
                "compare.selection",
                f"{source} is also in data.validation: choose on prompts that the systems are not compared on",
            )
