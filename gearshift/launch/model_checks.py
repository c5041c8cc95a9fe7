"""Where a run writes and which models it reads: each there and whole, and fit for the settings and for each other.

Only small files and headers are read; what lies on the hub is left to the processes that load it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gearshift.engine.folder import config_number
from gearshift.engine.plans import plan_for
from gearshift.errors import SettingError, UserError
from gearshift.launch import folders
from gearshift.launch.resume_checks import check_held, check_resume, check_start
from gearshift.rlhf.bench_settings import POLICY
from gearshift.rlhf.compare_settings import SystemSettings
from gearshift.rlhf.settings import (
    BenchConfig,
    CompareConfig,
    Config,
    PpoConfig,
    PretrainConfig,
    SftConfig,
    names_function,
)


def fails(field: str, problem: str | None) -> None:
    """Raises SettingError if there is a problem."""
    if problem:
        raise SettingError(field, problem)


def numbers(values: Iterator[int]) -> str:
    """The numbers that would be right: 1, 2 or 4."""
    found = list(values)
    if len(found) > 8:
        return f"{', '.join(map(str, found[:4]))} ... {found[-1]}"
    return " or ".join(filter(None, [", ".join(map(str, found[:-1])), str(found[-1])]))


def check_run_folder(config: Config) -> None:
    """An earlier run is not written over unasked, nor is a model that this run itself reads."""
    folder = Path(config.run.folder)
    _check_finished(config, folder)
    if isinstance(config, PretrainConfig | PpoConfig):
        check_held(config)
        if config.checkpoint.resumes:
            check_resume(config)
        else:
            check_start(config)
    for field, init in _inits(config):
        if Path(init).exists() and Path(init).resolve().is_relative_to(folder.resolve()):
            raise SettingError(
                field, f"{init} lies in run.folder, which this run writes into: choose another run.folder than {folder}"
            )


def _check_finished(config: Config, folder: Path) -> None:
    finished = folder / ("systems.json" if isinstance(config, CompareConfig) else "model")
    resumes = isinstance(config, PretrainConfig | PpoConfig) and config.checkpoint.resumes
    if finished.exists() and not config.run.overwrite and not resumes:
        raise SettingError(
            "run.folder", f"{folder} holds a finished run: choose another folder, or set run.overwrite: true"
        )


def _inits(config: Config) -> Iterator[tuple[str, str]]:
    """Every field that names a model, and the folder or hub name; words such as config and reward left out."""
    reward = POLICY if isinstance(config, BenchConfig) else None
    for section, word in (("policy", "config"), ("reward", reward), ("critic", "reward"), ("reference", "policy")):
        settings = getattr(config, section, None)
        if settings is not None and settings.init not in (None, word) and not names_function(settings.init):
            yield f"{section}.init", settings.init
    if isinstance(config, CompareConfig):
        for name, system in config.systems.items():
            yield f"systems.{name}.init", system.init


def tokenizer_folder(config: Config) -> str:
    """Where the run's tokenizer comes from: the first that names one of data.tokenizer, policy.init and systems."""
    if config.data.tokenizer is not None:
        return config.data.tokenizer
    if isinstance(config, CompareConfig):
        return next(iter(config.systems.values())).init
    assert isinstance(config, PretrainConfig | PpoConfig)
    return config.policy.init


def check_models(config: Config, ranks: int) -> None:
    tokenizer = config.data.tokenizer
    if tokenizer not in (None, "train"):
        fails("data.tokenizer", folders.tokenizer_problem(str(tokenizer)))
    if isinstance(config, CompareConfig):
        for name, system in config.systems.items():
            _check_system(name, system, config, ranks)
        fails("reference.init", folders.model_problem(config.reference.init))
        _check_reward(config)
    if isinstance(config, PretrainConfig):
        _check_trained(config)
    if isinstance(config, SftConfig) and config.train.best == "score":
        _check_writer("policy.init", config.policy.init, config, ranks)
        _check_reward(config)
    if isinstance(config, PpoConfig):
        _check_writer("policy.init", config.policy.init, config, ranks)
        if not (isinstance(config, BenchConfig) and config.all_of_one_shape):
            _check_reward(config)
        if config.critic.init != "reward":
            fails("critic.init", folders.model_problem(config.critic.init))
        if config.reference.init != "policy":
            fails("reference.init", folders.model_problem(config.reference.init, classifier=False))
    _check_tokens(config)
    if isinstance(config, PpoConfig | CompareConfig):
        for field, init in _inits(config):
            _check_reader(config, field, init)


def _check_reader(config: PpoConfig | CompareConfig, field: str, init: str) -> None:
    """A model that reads what the policy wrote has positions for it; one with tokens of its own has others to read."""
    if field == "reward.init" and folders.same_vocabulary(tokenizer_folder(config), init) is False:
        return
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    positions = config_number(folders.model_config(init) or {}, "max_position_embeddings", "n_positions")
    if positions and longest > positions:
        raise SettingError(
            field,
            f"{init} has {positions} positions, and data.max_prompt_tokens + rollout.max_new_tokens are {longest}: "
            "lower one of them",
        )


def _check_system(name: str, system: SystemSettings, config: CompareConfig, ranks: int) -> None:
    """The model of one system, with the sampling settings that are its own; these are the ones to blame if so."""
    own = config.model_copy(update={"rollout": system.rollout(config.rollout)})
    try:
        _check_writer(f"systems.{name}.init", system.init, own, ranks)
    except SettingError as error:
        setting = error.field.removeprefix("rollout.")
        if getattr(system, setting, None) is None or setting == error.field:
            raise
        raise SettingError(f"systems.{name}.{setting}", error.problem) from None


def _check_reward(config: PpoConfig | CompareConfig | SftConfig) -> None:
    """A reward model, or a function that can be found (its module is imported by the ranks only)."""
    reward = config.reward
    assert reward.init is not None
    if names_function(reward.init):
        fails("reward.init", function_problem(reward.init))
        if reward.chat_template:
            raise SettingError("reward.chat_template", f"{reward.init} is a function, which reads text: leave it out")
        if reward.offload:
            raise SettingError("reward.offload", f"{reward.init} is a function, which has no weights: leave it out")
        return
    fails("reward.init", folders.model_problem(reward.init, classifier=True))
    if reward.chat_template and folders.has_chat_template(reward.init) is False:
        raise SettingError("reward.chat_template", f"the tokenizer of {reward.init} has no chat template")


def function_problem(name: str) -> str | None:
    """Why "module:function" cannot be found, or None."""
    module, _, function = name.partition(":")
    try:
        found = bool(function) and importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    return None if found else f"{name} cannot be found: write module:function, the module on PYTHONPATH"


def _check_trained(config: PretrainConfig) -> None:
    """A model that a supervised stage trains: there, and with as many positions as its sequences need."""
    policy, data = config.policy, config.data
    if policy.init == "config":
        # Imported here: it takes seconds, which no other command should spend.
        from gearshift.rlhf.new_model import try_new_model

        try_new_model(policy.config or {})
    else:
        fails("policy.init", folders.model_problem(policy.init))
        if data.tokenizer is None:
            fails("policy.init", folders.tokenizer_problem(policy.init))
    positions = config_number(_model_config(config, policy.init), "max_position_embeddings", "n_positions")
    if positions and data.max_tokens > positions:
        raise SettingError(
            "data.max_tokens",
            f"{data.max_tokens} is more than the model's {positions} positions: use at most {positions}",
        )


def _check_writer(field: str, init: str, config: PpoConfig | CompareConfig | SftConfig, ranks: int) -> None:
    """A model that answers prompts: there, its heads divisible, with as many positions as prompt and answer need."""
    if init != "config":
        fails(field, folders.model_problem(init, classifier=False))
        if config.data.tokenizer is None:
            fails(field, folders.tokenizer_problem(init))
    model = _model_config(config, init)
    tp, prompt, response = config.rollout.tp_size, config.data.max_prompt_tokens, config.rollout.max_new_tokens
    heads = config_number(model, "num_attention_heads", "n_head", "num_heads")
    kv_heads = config_number(model, "num_key_value_heads") or heads
    if heads and kv_heads and not _heads_split(heads, kv_heads, tp):
        fitting = numbers(t for t in range(1, ranks + 1) if ranks % t == 0 and _heads_split(heads, kv_heads, t))
        raise SettingError(
            "rollout.tp_size", f"{tp} does not divide the {heads} attention heads ({kv_heads} for keys) of {init}: "
            f"use {fitting}"
        )  # fmt: skip
    if tp > 1:
        fails("rollout.tp_size", _plan_problem(model.get("model_type")))
    vocabulary, top_k = config_number(model, "vocab_size"), config.rollout.top_k
    if vocabulary and top_k and top_k > vocabulary:
        raise SettingError("rollout.top_k", f"{top_k} is more than the {vocabulary} tokens of {init}: leave it out")
    positions = config_number(model, "max_position_embeddings", "n_positions")
    ptx = None if isinstance(config, SftConfig) else config.ptx
    if positions and ptx is not None and (ptx.data or ptx.validation) and ptx.max_tokens > positions:
        raise SettingError("ptx.max_tokens", f"{ptx.max_tokens} is more than the {positions} positions of {init}")
    if positions and prompt + response > positions:
        raise SettingError(
            "rollout.max_new_tokens",
            f"{response}, with data.max_prompt_tokens = {prompt}, is more than the {positions} positions of {init}: "
            f"keep their sum at {positions} or below",
        )
    original = _original_positions(model)
    if original and prompt + response > original:
        raise SettingError(
            "rollout.max_new_tokens",
            f"{response}, with data.max_prompt_tokens = {prompt}, is more than the {original} positions of {init} for "
            f"which its rotary embedding stays the same: keep their sum at {original} or below",
        )


def _plan_problem(model_type: object) -> str | None:
    """Why a model of this type cannot be split over ranks, or None (also where that cannot be seen here)."""
    if not isinstance(model_type, str) or _transformers_has_a_plan(model_type) is not False:
        return None
    try:
        plan_for(model_type, None)
    except UserError as error:
        return str(error)
    return None


def _transformers_has_a_plan(model_type: str) -> bool | None:
    """Read off the source of its config class, since to import it takes seconds; None where there is no such file."""
    package = importlib.util.find_spec("transformers")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "models" / model_type.replace("-", "_")
    sources = [path.read_text(encoding="utf-8") for path in folder.glob("configuration_*.py")]
    return any("base_model_tp_plan" in source for source in sources) if sources else None


def _original_positions(model: dict[str, Any]) -> int | None:
    """Past these positions a "longrope" model has other frequencies for all of a row (see `replica.rotary_limit`)."""
    for name in ("rope_parameters", "rope_scaling"):  # the second by older versions of `transformers`
        rope = model.get(name)
        if isinstance(rope, dict) and "longrope" in (rope.get("rope_type"), rope.get("type")):
            return config_number({**rope, **model}, "original_max_position_embeddings")
    return None


def _heads_split(heads: int, kv_heads: int, tp: int) -> bool:
    # Fewer key heads than ranks are repeated, so either may divide the other.
    return heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)


def _model_config(config: Config, init: str) -> dict[str, Any]:
    policy = getattr(config, "policy", None)
    if init == "config" and policy is not None:
        return policy.config or {}
    return folders.model_config(init) or {}


def _check_tokens(config: Config) -> None:
    """Every model reads the ids of one tokenizer: it must have a row for each, and mean the same tokens by them."""
    tokenizer = tokenizer_folder(config)
    if isinstance(config, PpoConfig) and config.critic_is_reward and names_function(config.reward.init):
        raise SettingError(
            "critic.init",
            f"reward.init {config.reward.init} is a function, so it cannot start the critic: "
            "set critic.init to a folder with the policy's tokenizer (policy.init gets a new value head)",
        )
    if tokenizer in ("train", "config"):
        return
    for field, init in _inits(config):
        fails(field, folders.vocabulary_problem(init))
        other = field != "policy.init" and folders.same_vocabulary(tokenizer, init) is False
        starts_critic = isinstance(config, PpoConfig) and config.critic_is_reward
        reads_text = field == "reward.init" and not starts_critic
        if other and not reads_text:
            raise SettingError(*_other_tokens(config, field, init, tokenizer))
        fails(field, folders.room_problem(init, init if other else tokenizer))


def _other_tokens(config: Config, field: str, init: str, tokenizer: str) -> tuple[str, str]:
    """The field to blame and what to tell of a model with another tokenizer."""
    if field == "reward.init" and isinstance(config, PpoConfig):
        return "critic.init", (
            f"the tokenizer of the reward model {init} is not that of {tokenizer}, so it cannot start the critic: "
            "set critic.init to a folder with the policy's tokenizer"
        )
    if field == "critic.init":
        return field, (
            f"the tokenizer of {init} is not that of {tokenizer}, so it cannot start the critic: "
            "set critic.init to a folder with the policy's tokenizer"
        )
    return field, f"its tokenizer is not that of {tokenizer}: use a model with the same tokenizer"
