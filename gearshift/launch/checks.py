"""Settings against each other, the rank count and the small files that they name, before any process starts.

Everything here is cheap: of a model folder only the small files and the headers of the weights are read. The config of
a new model alone takes seconds, since `transformers` is asked whether such a model can be.
"""

from __future__ import annotations

import importlib.util
from typing import TypeGuard

from gearshift.engine.settings import RolloutSettings, check_attention_setting, check_shift
from gearshift.errors import SettingError
from gearshift.launch import folders
from gearshift.launch.bench_checks import check_bench
from gearshift.launch.compare_checks import check_comparison
from gearshift.launch.model_checks import check_models, check_run_folder, fails, numbers, tokenizer_folder
from gearshift.launch.ppo_checks import check_ppo, divides
from gearshift.launch.rows import readers, row_problems
from gearshift.rlhf.settings import (
    BenchConfig,
    CompareConfig,
    Config,
    DataSettings,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
    SftTrainSettings,
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


def check(config: Config, ranks: int) -> None:
    """Raises SettingError for the first combination that cannot run on `ranks` processes."""
    if config.run.ranks not in (None, ranks):
        raise SettingError(
            "run.ranks", f"{config.run.ranks}, but the launcher starts {ranks} processes: leave run.ranks out"
        )
    if isinstance(config, PretrainConfig):
        divides("train.batch_size", config.train.batch_size, ranks, f"the {ranks} ranks (run.ranks)")
    if isinstance(config, SftConfig):
        _check_pretraining_mix(config.train)
        _check_choice(config)
    if isinstance(config, PpoConfig):
        check_ppo(config, ranks)
    if isinstance(config, PpoConfig | CompareConfig) or _answers(config):
        _check_rollout(config, ranks)
    if isinstance(config, BenchConfig):
        check_bench(config)
    else:
        check_run_folder(config)
    if isinstance(config, CompareConfig):
        check_comparison(config)
    else:
        assert isinstance(config, PretrainConfig | PpoConfig)
        _check_tokenizer_settings(config)
        _check_lora(config)
        if not isinstance(config, BenchConfig):
            _check_trackers(config)
    _check_sources(config)
    check_models(config, ranks)
    _check_prompt_form(config)
    for field, problem in row_problems(config):
        raise SettingError(field, problem)


# --- answers ---------------------------------------------------------------------------------------------------------


def _answers(config: Config) -> TypeGuard[SftConfig]:
    """Whether a supervised stage writes answers, to choose its checkpoint by their score."""
    return isinstance(config, SftConfig) and config.train.best == "score"


def _check_choice(config: SftConfig) -> None:
    """What chooses the best checkpoint is there, and nothing is set that would choose nothing."""
    if not _answers(config):
        for field, unread in (
            ("reward.init", config.reward.init is not None),
            ("reward.chat_template", config.reward.chat_template),
            ("reward.offload", config.reward.offload),
            ("rollout", config.rollout != RolloutSettings()),
        ):
            if unread:
                raise SettingError(field, "only train.best: score reads it: set that, or leave it out")
        return
    if config.reward.init is None:
        raise SettingError("reward.init", "needed with train.best: score: a reward model or module:function")
    if not config.data.validation:
        raise SettingError("data.validation", "needed with train.best: score: rows whose prompts are answered")


def check_tensor_parallel(config: PpoConfig | CompareConfig | SftConfig, ranks: int) -> None:
    """Raises SettingError where the ranks do not make whole groups."""
    if ranks % config.rollout.tp_size:
        fitting = numbers(d for d in range(1, ranks + 1) if ranks % d == 0)
        raise SettingError(
            "rollout.tp_size", f"{config.rollout.tp_size} does not divide the {ranks} ranks (run.ranks): use {fitting}"
        )


def _check_rollout(config: PpoConfig | CompareConfig | SftConfig, ranks: int) -> None:
    check_tensor_parallel(config, ranks)
    check_shift(config.deepspeed, config.rollout.offload_optimizer)
    check_attention_setting(config.rollout.attention, config.run.dtype)


# --- sections --------------------------------------------------------------------------------------------------------


def _check_pretraining_mix(train: SftTrainSettings) -> None:
    if train.pretraining_fraction and not train.pretraining:
        raise SettingError("train.pretraining", "needed with train.pretraining_fraction above 0: sources of text")
    if train.pretraining and not train.pretraining_fraction:
        raise SettingError(
            "train.pretraining_fraction", "0, so train.pretraining would not be read: set 0.1 or remove the sources"
        )
    _check_texts_in_batch(train)


def _check_texts_in_batch(train: SftTrainSettings) -> None:
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
    if new_model and isinstance(config, PpoConfig | RewardConfig) and not isinstance(config, BenchConfig):
        raise SettingError("policy.init", "config (new weights) is for gearshift pretrain: name a trained model")
    if data.chat_template and data.prompt_template != DataSettings.model_fields["prompt_template"].default:
        raise SettingError("data.prompt_template", "is not used with data.chat_template: true; leave out one of them")
    if new_model and not policy.config:
        raise SettingError("policy.config", "needed with policy.init: config (model_type: llama, hidden_size: ...)")
    if policy.config and not new_model:
        raise SettingError("policy.config", f"only with policy.init: config, not with policy.init: {policy.init}")
    if data.tokenizer is None and new_model and not isinstance(config, BenchConfig):
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


def _check_lora(config: PretrainConfig | PpoConfig) -> None:
    if config.policy.lora is None:
        return
    if isinstance(config, RewardConfig):
        raise SettingError("policy.lora", "is for sft and ppo; a reward model trains all of its weights")
    if config.policy.init == "config":
        raise SettingError("policy.lora", "adapters go beside trained weights, and policy.init: config has none")
    if importlib.util.find_spec("peft") is None:
        raise SettingError("policy.lora", 'this needs peft: pip install "gearshift[lora]"')


def _check_trackers(config: PretrainConfig | PpoConfig) -> None:
    for name in config.tracking.trackers:
        if name not in TRACKERS:
            raise SettingError("tracking.trackers", f"{name} is unknown: use some of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise SettingError("tracking.trackers", f"{name} is not installed: pip install {TRACKERS[name]}")


def _check_prompt_form(config: Config) -> None:
    data = config.data
    if data.prompt_template.count("{prompt}") != 1:
        raise SettingError("data.prompt_template", f"should hold {{prompt}} once, not {data.prompt_template!r}")
    tokenizer = tokenizer_folder(config)
    if data.chat_template and folders.has_chat_template(tokenizer) is False:
        raise SettingError(
            "data.chat_template",
            f"the tokenizer of {tokenizer} has no chat template (tokenizer_config.json or chat_template.jinja): "
            "set data.prompt_template instead",
        )


# --- files -----------------------------------------------------------------------------------------------------------


def _check_sources(config: Config) -> None:
    needed = "data.validation" if isinstance(config, CompareConfig) else "data.train"
    if not getattr(config.data, needed.removeprefix("data.")) and not isinstance(config, BenchConfig):
        raise SettingError(needed, "missing: sources (.jsonl, .jsonl.gz, .parquet, .txt or a hub name)")
    for field, sources, _ in readers(config):
        for source in sources:
            fails(field, folders.source_problem(source))
