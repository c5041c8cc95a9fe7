"""Settings against each other, the rank count and the small files that they name, before any process starts.

Everything here is cheap: of a model folder only config.json and the tokenizer's vocabulary are read.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from gearshift.errors import UserError
from gearshift.launch import folders
from gearshift.launch.rows import readers, row_problems
from gearshift.rlhf.settings import (
    CompareConfig,
    Config,
    DataSettings,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
    TrainSettings,
)

# accelerate's name of a tracker -> the package that has to be installed for it.
TRACKERS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "comet_ml": "comet_ml",
    "aim": "aim",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
    "trackio": "trackio",
}


class SettingError(UserError):
    """`field` ("ppo.batch_size") cannot be what it is; `problem` says why and what would be right."""

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem


def check(config: Config, ranks: int) -> None:
    """Raises SettingError for the first combination that cannot run on `ranks` processes."""
    if config.run.ranks not in (None, ranks):
        raise SettingError(
            "run.ranks", f"{config.run.ranks}, but the launcher starts {ranks} processes: leave run.ranks out"
        )
    if isinstance(config, PretrainConfig):
        _divides("train.batch_size", config.train.batch_size, ranks, f"the {ranks} ranks (run.ranks)")
        _check_pretraining_mix(config)
    if isinstance(config, PpoConfig):
        _check_ppo_batches(config, ranks)
        if config.ptx.coef > 0 and not config.ptx.data:
            raise SettingError("ptx.data", "needed with ptx.coef above 0: sources of pretraining text")
    if isinstance(config, PpoConfig | CompareConfig) and ranks % config.rollout.tp_size:
        fitting = _numbers(d for d in range(1, ranks + 1) if ranks % d == 0)
        raise SettingError(
            "rollout.tp_size", f"{config.rollout.tp_size} does not divide the {ranks} ranks (run.ranks): use {fitting}"
        )
    if isinstance(config, CompareConfig):
        _check_unread(config)
        _check_checker(config.compare.true_score)
    else:
        assert isinstance(config, PretrainConfig | PpoConfig)
        _check_tokenizer_settings(config)
        _check_trackers(config)
    _check_sources(config)
    _check_models(config, ranks)
    for field, problem in row_problems(config):
        raise SettingError(field, problem)


# --- batch sizes -----------------------------------------------------------------------------------------------------


def _divides(field: str, value: int, divisor: int, what: str, step: int | None = None) -> None:
    """`value` splits into `divisor` equal parts; the values named as right are multiples of `step`."""
    if value % divisor == 0:
        return
    step = step or divisor
    below = value // step * step
    near = f"{below} or {below + step}" if below else f"{step}"
    raise SettingError(field, f"{value} does not divide by {what}: use {near}")


def _check_ppo_batches(config: PpoConfig, ranks: int) -> None:
    ppo = config.ppo
    step = ppo.minibatches * ranks
    _divides("ppo.batch_size", ppo.batch_size, ranks, f"the {ranks} ranks (run.ranks)", step)
    _divides("ppo.batch_size", ppo.batch_size, ppo.minibatches, f"ppo.minibatches = {ppo.minibatches}", step)
    if ppo.minibatch_size % ranks:
        fitting = _numbers(m for m in range(1, ppo.batch_size // ranks + 1) if ppo.batch_size // ranks % m == 0)
        raise SettingError(
            "ppo.minibatches",
            f"{ppo.minibatches} makes minibatches of {ppo.minibatch_size} episodes (of ppo.batch_size = "
            f"{ppo.batch_size}), which do not divide by the {ranks} ranks (run.ranks): use {fitting}",
        )
    _divides("ppo.episodes", ppo.episodes, ppo.batch_size, f"ppo.batch_size = {ppo.batch_size}")


def _numbers(values: Iterator[int]) -> str:
    found = list(values)
    if len(found) > 8:
        return f"{', '.join(map(str, found[:4]))} ... {found[-1]}"
    return " or ".join(filter(None, [", ".join(map(str, found[:-1])), str(found[-1])]))


def _check_unread(config: CompareConfig) -> None:
    """What stands in a section that compare shares with ppo, but trains nothing with."""
    for field, value in (
        ("data.train", config.data.train),
        ("ptx.data", config.ptx.data),
        ("ptx.coef", config.ptx.coef),
    ):
        if value:
            raise SettingError(field, "gearshift compare trains nothing, so it would not be read: leave it out")


def _check_checker(name: str | None) -> None:
    """`module:function` can be found; the module itself is imported by the ranks only."""
    if name is None:
        return
    module, _, function = name.partition(":")
    try:
        found = bool(function) and importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise SettingError(
            "compare.true_score", f"{name} cannot be found: write module:function, the module on PYTHONPATH"
        )


# --- sections --------------------------------------------------------------------------------------------------------


def _check_pretraining_mix(config: PretrainConfig) -> None:
    train = config.train
    if train.pretraining_fraction and not isinstance(config, SftConfig):
        raise SettingError("train.pretraining_fraction", "only gearshift sft mixes pretraining text in: leave it out")
    if train.pretraining_fraction and not train.pretraining:
        raise SettingError("train.pretraining", "needed with train.pretraining_fraction above 0: sources of text")
    if train.pretraining and not train.pretraining_fraction:
        raise SettingError(
            "train.pretraining_fraction", "0, so train.pretraining would not be read: set 0.1 or remove the sources"
        )
    _check_texts_in_batch(train)


def _check_texts_in_batch(train: TrainSettings) -> None:
    """A fraction that rounds to no sequence of text, or to nothing but text, is not what was asked for."""
    texts = round(train.batch_size * train.pretraining_fraction)
    if train.pretraining_fraction and not 0 < texts < train.batch_size:
        raise SettingError(
            "train.pretraining_fraction",
            f"{train.pretraining_fraction} of train.batch_size = {train.batch_size} is {texts} sequences of text: "
            f"use a fraction between {1 / train.batch_size:.2g} and {1 - 1 / train.batch_size:.2g}",
        )


def _check_tokenizer_settings(config: PretrainConfig | PpoConfig) -> None:
    policy, data = config.policy, config.data
    new_model = policy.init == "config"
    if new_model and isinstance(config, PpoConfig | RewardConfig):
        raise SettingError("policy.init", "config (new weights) is for gearshift pretrain: name a trained model")
    if data.chat_template and data.prompt_template != DataSettings.model_fields["prompt_template"].default:
        raise SettingError("data.prompt_template", "is not used with data.chat_template: true; leave out one of them")
    if new_model and not policy.config:
        raise SettingError("policy.config", "needed with policy.init: config (model_type: llama, hidden_size: ...)")
    if new_model and "model_type" not in (policy.config or {}):
        raise SettingError("policy.config.model_type", "missing: a transformers model type, such as llama")
    if policy.config and not new_model:
        raise SettingError("policy.config", f"only with policy.init: config, not with policy.init: {policy.init}")
    if data.tokenizer is None and new_model:
        raise SettingError("data.tokenizer", "needed with policy.init: config: a folder, a hub name or train")
    if data.tokenizer != "train":
        for field in ("vocab_size", "tokenizer_text"):
            if getattr(data, field):
                raise SettingError(f"data.{field}", "only with data.tokenizer: train")
        return
    if not new_model or isinstance(config, PpoConfig | RewardConfig | SftConfig):
        raise SettingError(
            "data.tokenizer", "train is for gearshift pretrain with policy.init: config: a trained model has its own"
        )
    if data.vocab_size is None:
        raise SettingError("data.vocab_size", "needed with data.tokenizer: train, in tokens, such as 8192")


def _check_trackers(config: PretrainConfig | PpoConfig) -> None:
    for name in config.tracking.trackers:
        if name not in TRACKERS:
            raise SettingError("tracking.trackers", f"{name} is unknown: use some of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise SettingError("tracking.trackers", f"{name} is not installed: pip install {TRACKERS[name]}")


# --- files -----------------------------------------------------------------------------------------------------------


def _check_sources(config: Config) -> None:
    needed = "data.validation" if isinstance(config, CompareConfig) else "data.train"
    if not getattr(config.data, needed.removeprefix("data.")):
        raise SettingError(needed, "missing: sources (.jsonl, .jsonl.gz, .parquet, .txt or a hub name)")
    for field, sources, _ in readers(config):
        for source in sources:
            _fails(field, folders.source_problem(source))


def _check_models(config: Config, ranks: int) -> None:
    tokenizer = config.data.tokenizer
    if tokenizer not in (None, "train"):
        _fails("data.tokenizer", folders.tokenizer_problem(str(tokenizer)))
    if isinstance(config, CompareConfig):
        for name, system in config.systems.items():
            _check_writer(f"systems.{name}.init", system.init, config, ranks)
        _fails("reference.init", folders.model_problem(config.reference.init))
        _fails("reward.init", folders.model_problem(config.reward.init, classifier=True))
    if isinstance(config, PretrainConfig):
        _check_trained(config)
    if isinstance(config, PpoConfig):
        _check_writer("policy.init", config.policy.init, config, ranks)
        _fails("reward.init", folders.model_problem(config.reward.init, classifier=True))
        _check_companions(config)


def _fails(field: str, problem: str | None) -> None:
    if problem:
        raise SettingError(field, problem)


def _check_trained(config: PretrainConfig) -> None:
    """A model that a supervised stage trains: there, and with as many positions as its sequences need."""
    policy, data = config.policy, config.data
    if policy.init != "config":
        _fails("policy.init", folders.model_problem(policy.init))
        if data.tokenizer is None:
            _fails("policy.init", folders.tokenizer_problem(policy.init))
    positions = _number(_model_config(config, policy.init), "max_position_embeddings", "n_positions")
    if positions and data.max_tokens > positions:
        raise SettingError(
            "data.max_tokens",
            f"{data.max_tokens} is more than the model's {positions} positions: use at most {positions}",
        )


def _check_writer(field: str, init: str, config: PpoConfig | CompareConfig, ranks: int) -> None:
    """A model that answers prompts: there, its heads divisible, with as many positions as prompt and answer need."""
    if init != "config":
        _fails(field, folders.model_problem(init, classifier=False))
        if config.data.tokenizer is None:
            _fails(field, folders.tokenizer_problem(init))
    model = _model_config(config, init)
    tp, prompt, response = config.rollout.tp_size, config.data.max_prompt_tokens, config.rollout.max_new_tokens
    heads = _number(model, "num_attention_heads", "n_head", "num_heads")
    kv_heads = _number(model, "num_key_value_heads") or heads
    if heads and kv_heads and not _heads_split(heads, kv_heads, tp):
        fitting = _numbers(t for t in range(1, ranks + 1) if ranks % t == 0 and _heads_split(heads, kv_heads, t))
        raise SettingError(
            "rollout.tp_size", f"{tp} does not divide the {heads} attention heads ({kv_heads} for keys) of {init}: "
            f"use {fitting}"
        )  # fmt: skip
    positions = _number(model, "max_position_embeddings", "n_positions")
    if positions and (config.ptx.data or config.ptx.validation) and config.ptx.max_tokens > positions:
        raise SettingError(
            "ptx.max_tokens", f"{config.ptx.max_tokens} is more than the {positions} positions of {init}"
        )
    if positions and prompt + response > positions:
        raise SettingError(
            "rollout.max_new_tokens",
            f"{response}, with data.max_prompt_tokens = {prompt}, is more than the {positions} positions of {init}: "
            f"keep their sum at {positions} or below",
        )


def _heads_split(heads: int, kv_heads: int, tp: int) -> bool:
    # Fewer key heads than ranks are repeated, so either may divide the other.
    return heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)


def _model_config(config: Config, init: str) -> dict[str, Any]:
    policy = getattr(config, "policy", None)
    if init == "config" and policy is not None:
        return policy.config or {}
    return folders.model_config(init) or {}


def _number(model: dict[str, Any], *names: str) -> int | None:
    """The first of these fields that a config.json has, in its text part too."""
    for values in (model, model.get("text_config") or {}):
        for name in names:
            if isinstance(values.get(name), int):
                return int(values[name])
    return None


def _check_companions(config: PpoConfig) -> None:
    """Critic and reference read the policy's token ids, so they must mean the same tokens."""
    policy = config.data.tokenizer or config.policy.init
    critic, reference = config.critic.init, config.reference.init
    if critic != "reward":
        _fails("critic.init", folders.model_problem(critic))
    if reference != "policy":
        _fails("reference.init", folders.model_problem(reference, classifier=False))
    critic_folder = config.reward.init if critic == "reward" else critic
    if folders.same_vocabulary(policy, critic_folder) is False:
        of = f"the reward model {critic_folder}" if critic == "reward" else critic_folder
        raise SettingError(
            "critic.init",
            f"the tokenizer of {of} is not that of {policy}, so it cannot start the critic: "
            "set critic.init to a folder with the policy's tokenizer",
        )
    if folders.same_vocabulary(policy, config.reward.init) is False:
        raise SettingError(
            "reward.init", f"its tokenizer is not that of {policy}, which is not supported yet: use one with the same"
        )
    if reference != "policy" and folders.same_vocabulary(policy, reference) is False:
        raise SettingError(
            "reference.init", f"its tokenizer is not that of {policy}: use a model with the policy's tokenizer"
        )
