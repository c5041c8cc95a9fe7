"""`gearshift plan CONFIG.yaml`: what a PPO run needs on each rank, before any GPU is rented. Reads no weights."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gearshift.engine.settings import check_shift
from gearshift.errors import SettingError, UserError
from gearshift.launch.checks import check_tensor_parallel
from gearshift.launch.overrides import parse_arguments
from gearshift.launch.planner.machines import GPUS, gpu_of
from gearshift.launch.ppo_checks import check_ppo
from gearshift.rlhf.settings import PpoConfig, names_function

ROLES = ("policy", "critic", "reference", "reward")
NOT_PPO = {"train": "pretrain, sft or reward", "systems": "compare"}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when the run fits, 1 when it does not. Raises UserError."""
    options, rest = _parser().parse_known_args(list(sys.argv[1:] if argv is None else argv))
    arguments = parse_arguments(rest)
    if arguments.config is None:
        raise UserError("a config file is missing: gearshift plan CONFIG.yaml")
    if arguments.hostfile:
        raise UserError("--hostfile: say --gpus N --gpus-per-host M instead: nothing is started")
    config = _load(arguments.config, arguments.overrides)
    gpus = options.gpus or config.run.ranks or 8
    try:
        _check(config, gpus)
        lines, fits = _told(config, options, gpus)
    except SettingError as error:
        raise UserError(f"{arguments.config}: {error}") from None
    print("\n".join(lines))
    return 0 if fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gearshift plan",
        allow_abbrev=False,
        usage="gearshift plan CONFIG.yaml [--section.field value ...] [--gpus N] [--gpu NAME] [options]",
        description="Memory of each rank in each phase of a PPO run, bytes of a shift, and what fits. Exit code 1: it "
        "does not fit.",
    )
    parser.add_argument("--gpus", type=_count, help="how many; default run.ranks, or else 8")
    parser.add_argument("--gpus-per-host", type=_count, default=8, help="default 8")
    parser.add_argument("--gpu", default="h100-80g", help=f"one of {', '.join(GPUS)}; default h100-80g")
    parser.add_argument("--memory-gb", type=_amount, help="memory of a GPU, in place of what --gpu has")
    parser.add_argument("--within-gbs", type=_amount, help="GB/s in one direction between GPUs of a host")
    parser.add_argument("--between-gbs", type=_amount, help="GB/s in one direction of a GPU to other hosts")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="[ROLE=]FOLDER",
        help="a folder with a config.json, for a model that is not here: one of policy, critic, reference and reward, "
        "or all of them",
    )
    parser.add_argument("--json", action="store_true", help="for machines: bytes and seconds")
    return parser


def _count(text: str) -> int:
    return int(_amount(text, whole=True))


def _amount(text: str, whole: bool = False) -> float:
    try:
        value = float(int(text) if whole else text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{text!r} is not a {'whole number' if whole else 'number'} above 0")
    return value


def _load(path: str, overrides: list[tuple[str, str]]) -> PpoConfig:
    from gearshift.launch.config import load, read_values

    for section, commands in NOT_PPO.items():
        if section in read_values(path):
            raise UserError(f"{path}: {section}: a config of gearshift {commands}; plans are made of gearshift ppo's")
    config = load("ppo", path, overrides)
    assert isinstance(config, PpoConfig)
    return config


def _check(config: PpoConfig, ranks: int) -> None:
    """What `gearshift ppo` would refuse, as far as it can be seen without data, weights or GPUs."""
    if config.run.ranks not in (None, ranks):
        raise SettingError(
            "run.ranks", f"{config.run.ranks}, but the plan is for --gpus {ranks}: leave one of them out"
        )
    check_ppo(config, ranks)
    check_tensor_parallel(config, ranks)
    check_shift(config.deepspeed, config.rollout.offload_optimizer)


def _told(config: PpoConfig, options: argparse.Namespace, ranks: int) -> tuple[list[str], bool]:
    """Lines for the screen, and whether the run fits."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch

    from gearshift.launch.planner.ppo import PpoPlan
    from gearshift.launch.planner.report import Findings, Machines, as_json, as_text

    gpu = gpu_of(options.gpu)
    given = {"memory": options.memory_gb, "within": options.within_gbs, "between": options.between_gbs}
    own: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    machines = Machines(options.gpu, ranks, options.gpus_per_host, replace(gpu, **own))
    dtype = torch.float32 if config.run.dtype == "fp32" else torch.bfloat16
    plan = PpoPlan(config, _shapes(config, options.model), ranks, min(options.gpus_per_host, ranks), dtype)
    found = Findings.of(plan, machines)
    return [json.dumps(as_json(found), indent=1)] if options.json else as_text(found), found.fits


def _shapes(config: PpoConfig, given: list[str]) -> Any:
    from gearshift.engine.room import positions_of
    from gearshift.launch.planner.models import shape_of
    from gearshift.launch.planner.ppo import Shapes

    named = _named(given)
    policy = shape_of("policy.init", config.policy.init, named.get("policy"))
    reward = critic = None
    if not names_function(config.reward.init):
        reward = shape_of("reward.init", config.reward.init, named.get("reward"))
    if config.has_critic:
        own = any(text.startswith("critic=") for text in given) or config.critic.init != "reward"
        critic = shape_of("critic.init", config.critic.init, named.get("critic")) if own else reward
    reference = policy
    if config.reference.init != "policy":
        reference = shape_of("reference.init", config.reference.init, named.get("reference"))
    longest, positions = config.data.max_prompt_tokens + config.rollout.max_new_tokens, positions_of(policy)
    if positions and longest > positions:
        raise SettingError(
            "rollout.max_new_tokens",
            f"{config.rollout.max_new_tokens}, with data.max_prompt_tokens = {config.data.max_prompt_tokens}, is more "
            f"than the policy's {positions} positions: keep their sum at {positions} or below",
        )
    return Shapes(policy, reward, critic, reference)


def _named(given: list[str]) -> dict[str, str]:
    """Role -> folder; what is given for all roles stands in where nothing is given for one."""
    named: dict[str, str] = {}
    for text in sorted(given, key=lambda text: "=" not in text):
        role, equals, folder = text.rpartition("=")
        if equals and role not in ROLES:
            raise UserError(f"--model: {role} is no model of a PPO run: use {', '.join(ROLES)}, or the folder alone")
        for name in [role] if equals else ROLES:
            named.setdefault(name, folder)
    return named
