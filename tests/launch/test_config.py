"""A config is right, or one line says what is wrong, where, and what would be right."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

import gearshift.launch
from gearshift.errors import UserError
from gearshift.launch.config import CONFIGS, fields, help_text, load, save
from gearshift.launch.rows import readers

from .conftest import changed, error_of, example, model_folder, write


@pytest.mark.parametrize("command", CONFIGS)
def test_the_examples_are_right(here: Path, command: str) -> None:
    config = load(command, write(example(command)), ranks=2)
    assert type(config) is CONFIGS[command]


def test_one_stop_text_is_a_list_of_one(here: Path) -> None:
    assert load("ppo", write(changed(example("ppo"), "rollout.stop", "\n\n"))).rollout.stop == ["\n\n"]  # type: ignore


def test_top_k_is_at_most_the_vocabulary(here: Path) -> None:
    model_folder(here / "small", vocab_size=9)
    values = changed(changed(example("ppo"), "policy.init", "small"), "rollout.top_k", 10)
    assert error_of("ppo", values).endswith("rollout.top_k: 10 is more than the 9 tokens of small: leave it out")


def test_flash_attn_is_not_for_fp32(here: Path) -> None:
    values = changed(changed(example("ppo"), "run.dtype", "fp32"), "rollout.attention", "flash")
    assert error_of("ppo", values).endswith(
        "rollout.attention: flash-attn knows no fp32: set run.dtype to bf16, or use sdpa"
    )


@pytest.mark.parametrize("command", CONFIGS)
def test_a_saved_config_is_the_same_config(here: Path, command: str) -> None:
    config = load(command, write(example(command)))
    save(config, "saved.yaml")
    assert load(command, "saved.yaml") == config


def test_defaults_are_those_of_the_paper(here: Path) -> None:
    values = changed(example("ppo"), "ppo", None)
    config = load("ppo", write(values))
    assert (config.ppo.episodes, config.ppo.batch_size, config.ppo.minibatches) == (256_000, 512, 8)  # type: ignore
    assert (config.ppo.iterations, config.ppo.minibatch_size) == (500, 64)  # type: ignore[attr-defined]
    assert config.ppo.kl.coef == 0.02  # type: ignore[attr-defined]
    assert config.optimizer.betas == (0.9, 0.95)  # type: ignore[attr-defined]


def test_a_number_with_an_exponent_is_a_number(here: Path) -> None:
    Path("config.yaml").write_text(Path(write(example("ppo"))).read_text() + "optimizer: {learning_rate: 1e-5}\n")
    assert load("ppo", "config.yaml").optimizer.learning_rate == 1e-5  # type: ignore[attr-defined]


def test_one_source_is_a_list_of_one(here: Path) -> None:
    assert load("pretrain", write(example("pretrain"))).data.train == ["text.txt"]


def test_file_and_line_are_named(here: Path) -> None:
    Path("a.yaml").write_text("run:\n  folder: runs/a\nppo:\n  epochs: 1\n  clip: no\n")
    with pytest.raises(UserError, match=r"^a\.yaml:5: ppo\.clip: should be a valid number, not False$"):
        load("ppo", "a.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("run: [", "bad.yaml:2: not YAML"),
        ("- run", "bad.yaml: should hold sections"),
        ("run:\n  seed: 1\n  seed: 2\n", "bad.yaml:3: run.seed: set twice, first in line 2"),
    ],
)
def test_a_file_that_is_no_config(here: Path, text: str, says: str) -> None:
    Path("bad.yaml").write_text(text + "\n")
    with pytest.raises(UserError) as caught:
        load("ppo", "bad.yaml")
    assert str(caught.value).startswith(says)
    Path("bad.yaml").write_bytes(b"run: {folder: caf\xe9}\n")
    with pytest.raises(UserError, match=r"^bad\.yaml: is not UTF-8 text: invalid continuation byte at byte 17$"):
        load("ppo", "bad.yaml")
    with pytest.raises(UserError, match=r"none\.yaml: there is no such config file"):
        load("ppo", "none.yaml")


def test_overrides_win_and_are_yaml(here: Path) -> None:
    overrides = [
        ("ppo.kl.coef", "0.05"),
        ("optimizer.learning_rate", "3e-6"),
        ("ptx.data", "[text.txt]"),
        ("ptx.coef", "27.8"),
        ("run.dtype", "null"),
        ("deepspeed.zero_optimization.offload_optimizer.device", "cpu"),
        ("data.prompt_template", "{prompt}: why?"),
    ]
    config: Any = load("ppo", write(example("ppo")), overrides, ranks=2)
    assert (config.ppo.kl.coef, config.ppo.batch_size) == (0.05, 64)
    assert config.optimizer.learning_rate == 3e-6
    assert config.ptx.data == ["text.txt"]
    assert config.deepspeed == {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert config.data.prompt_template == "{prompt}: why?"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("{prompt}", "{prompt}"),  # as YAML, a mapping
        ("{prompt}\n", "{prompt}\n"),
        ("Q: {prompt}\nA:", "Q: {prompt}\nA:"),
        ("one\n{prompt} # two", "one\n{prompt} # two"),  # as YAML, one line and a comment
        (r'"{prompt}\n"', "{prompt}\n"),
    ],
)
def test_an_override_of_a_text_is_that_text(here: Path, typed: str, meant: str) -> None:
    config: Any = load("ppo", write(example("ppo")), [("data.prompt_template", typed)], ranks=2)
    assert config.data.prompt_template == meant


def test_other_texts_on_the_command_line(here: Path) -> None:
    overrides = [("run.folder", "7"), ("data.turn", ""), ("data.tokenizer", "null")]
    config: Any = load("ppo", write(example("ppo")), overrides, ranks=2)
    assert (config.run.folder, config.data.turn, config.data.tokenizer) == ("7", "", None)
    config = load("compare", write(example("compare")), [("systems.sft.prefix", "{Q}: ")], ranks=2)
    assert config.systems["sft"].prefix == "{Q}: "


def test_a_wrong_override_is_blamed_on_the_command_line(here: Path) -> None:
    text = error_of("ppo", example("ppo"), overrides=(("ppo.clip", "wide"),))
    assert text == "command line: ppo.clip: should be a valid number, not 'wide'"
    text = error_of("ppo", example("ppo"), overrides=(("run.folder.name", "x"),))
    assert text == "command line: run.folder.name: folder is a single value, it has no fields"


def test_owner_slash_name_is_left_to_the_hub_unless_the_owner_is_a_folder_here(here: Path) -> None:
    load("ppo", write(changed(example("ppo"), "policy.init", "EleutherAI/pythia-70m")), ranks=2)
    load("ppo", write(changed(example("ppo"), "data.train", "openai/gsm8k/main:train[:10%]")), ranks=2)
    Path("runs").mkdir()
    error_of("ppo", changed(example("ppo"), "policy.init", "runs/sft"))


def test_what_must_simply_pass(here: Path) -> None:
    with gzip.open("more.jsonl.gz", "wt") as file:
        file.write('{"inputs": "2 + 3 =", "targets": "5"}\n')
    load("sft", write(changed(example("sft"), "data.train", ["answers.jsonl", "more.jsonl.gz"])), ranks=2)
    # Fewer key heads than ranks are repeated.
    model_folder(here / "one-key", num_attention_heads=4, num_key_value_heads=1)
    load("ppo", write(changed(example("ppo"), "policy.init", "one-key")), ranks=2)
    model_folder(here / "opt", model_type="opt", num_attention_heads=4)
    load("ppo", write(changed(example("ppo"), "policy.init", "opt")), ranks=2)


@pytest.mark.parametrize("command", CONFIGS)
def test_help_has_every_field_with_default_and_description(command: str) -> None:
    text = help_text(command)
    for name, _, default, description in fields(CONFIGS[command]):
        assert f"  --{name} " in text
        assert description, name
        assert f"({'default ' + default if default else 'required'})\n      {description}" in text


def ppo_with(**settings: Any) -> dict[str, Any]:
    values = example("ppo")
    for key, value in settings.items():
        values = changed(values, key.replace("__", "."), value)
    return values


def test_a_reward_model_that_reads_other_tokens_cannot_start_the_critic(here: Path) -> None:
    model_folder(here / "foreign", {"a": 0}, architectures=["LlamaForSequenceClassification"])
    told = error_of("ppo", ppo_with(reward__init="foreign"))
    assert "critic.init: the tokenizer of the reward model foreign is not" in told
    load("ppo", write(ppo_with(reward__init="foreign", critic__init="sft")), ranks=2)
    load("compare", write(changed(example("compare"), "reward.init", "foreign")), ranks=2)
    without_critic = ppo_with(reward__init="foreign", ppo__advantage="rloo", ppo__answers=2)
    load("ppo", write(without_critic), ranks=2)
    model_folder(here / "small", {"a": 0, "b": 400}, architectures=["LlamaForSequenceClassification"], vocab_size=300)
    told = error_of("ppo", ppo_with(reward__init="small", critic__init="sft"))
    assert "reward.init: small: its config.json has vocab_size 300" in told
    told = error_of("ppo", ppo_with(reward__init="foreign", critic__init="sft", reward__chat_template=True))
    assert "reward.chat_template: the tokenizer of foreign has no chat template" in told


def test_sft_that_chooses_by_score_is_checked_as_what_answers(here: Path) -> None:
    """Its reward may read other tokens or be a function; its rollouts must fit, and there must be prompts."""

    def chosen(**settings: Any) -> dict[str, Any]:
        values = example("sft")
        given = {"train__best": "score", "reward__init": "reward", "data__validation": "answers.jsonl"}
        for key, value in {**given, "rollout__max_new_tokens": 8, **settings}.items():
            values = changed(values, key.replace("__", "."), value)
        return values

    model_folder(here / "foreign", {"a": 0}, architectures=["LlamaForSequenceClassification"])
    for init in ("reward", "foreign", "gearshift.rlhf.rewards:load_function"):
        load("sft", write(chosen(reward__init=init)), ranks=2)
    assert "data.validation: needed with train.best: score" in error_of("sft", chosen(data__validation=[]))
    assert "rollout.tp_size: 3 does not divide the 2 ranks" in error_of("sft", chosen(rollout__tp_size=3))
    assert "reward.init: there is no model folder none" in error_of("sft", chosen(reward__init="none"))
    model_folder(here / "short", max_position_embeddings=1030)
    short = chosen(policy__init="short", data__max_tokens=64)
    assert "rollout.max_new_tokens: 8, with data.max_prompt_tokens = 1024" in error_of("sft", short)


def test_a_function_as_the_reward(here: Path) -> None:
    name = "gearshift.rlhf.rewards:load_function"
    assert f"critic.init: reward.init {name} is a function" in error_of("ppo", ppo_with(reward__init=name))
    load("ppo", write(ppo_with(reward__init=name, critic__init="sft")), ranks=2)
    told = error_of("ppo", ppo_with(reward__init="no.such:thing", critic__init="sft"))
    assert "reward.init: no.such:thing cannot be found" in told
    told = error_of("ppo", ppo_with(reward__init=name, critic__init="sft", reward__chat_template=True))
    assert "which reads text" in told
    load("compare", write(changed(example("compare"), "reward.init", name)), ranks=2)


@pytest.mark.parametrize(
    ("command", "changes", "told"),
    [
        ("ppo", {"policy.init": "config"}, "policy.init: config (new weights) is for gearshift pretrain"),
        ("reward", {"policy.init": "config"}, "policy.init: config (new weights) is for gearshift pretrain"),
        ("ppo", {"run.seed": 2**40}, "run.seed: "),
        (
            "ppo",
            {"data.chat_template": True, "data.prompt_template": "Q: {prompt}"},
            "data.prompt_template: is not used with data.chat_template",
        ),
        ("compare", {"compare.true_score": "no.such:thing"}, "compare.true_score: no.such:thing cannot be found"),
    ],
)
def test_what_would_only_fail_in_the_ranks(here: Path, command: str, changes: dict[str, Any], told: str) -> None:
    values = example(command)
    for key, value in changes.items():
        values = changed(values, key, value)
    assert told in error_of(command, values)


def test_a_fraction_that_rounds_to_no_text_is_refused(here: Path) -> None:
    values = changed(changed(example("sft"), "train.pretraining", ["text.txt"]), "train.batch_size", 4)
    assert "is 0 sequences of text" in error_of("sft", changed(values, "train.pretraining_fraction", 0.1))
    assert "is 4 sequences of text" in error_of("sft", changed(values, "train.pretraining_fraction", 0.9))
    load("sft", write(changed(values, "train.pretraining_fraction", 0.25)), ranks=2)


def test_an_adaptive_coefficient_can_move_both_ways(here: Path) -> None:
    """The shortest horizon that passes leaves the largest step down, 1 − 0.2 · 64 / 13, above 0."""
    load("ppo", write(changed(example("ppo"), "ppo.kl", {"target": 6.0, "horizon": 13})), ranks=2)


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_is_found_where_transformers_saves_it(here: Path, file: str) -> None:
    (here / "sft" / file).write_text('{"chat_template": "{{ messages }}"}')
    load("ppo", write(changed(example("ppo"), "data.chat_template", True)), ranks=2)


def test_a_template_gives_text_to_an_empty_prompt(here: Path) -> None:
    Path("empty.jsonl").write_text('{"prompt": ""}\n')
    values = changed(example("ppo"), "data.train", "empty.jsonl")
    load("ppo", write(changed(values, "data.prompt_template", "Say something: {prompt}")), ranks=2)


@pytest.mark.parametrize(("command", "result"), [("ppo", "model"), ("sft", "model"), ("compare", "systems.json")])
def test_a_finished_run_is_not_written_over_unasked(here: Path, command: str, result: str) -> None:
    (here / "runs" / command / result).mkdir(parents=True)
    assert error_of(command, example(command)) == (
        f"config.yaml:2: run.folder: runs/{command} holds a finished run: choose another folder, or set "
        "run.overwrite: true"
    )
    load(command, write(changed(example(command), "run.overwrite", True)), ranks=2)


@pytest.mark.parametrize(
    ("command", "field"),
    [
        ("sft", "policy.init"),
        ("ppo", "policy.init"),
        ("ppo", "reward.init"),
        ("ppo", "critic.init"),
        ("ppo", "reference.init"),
        ("compare", "reference.init"),
        ("compare", "systems.sft.init"),
    ],
)
def test_a_run_does_not_write_where_it_reads(here: Path, command: str, field: str) -> None:
    """Not even when it may write over a finished run: its own start would be lost."""
    classifier = {"architectures": ["LlamaForSequenceClassification"]} if field == "reward.init" else {}
    model_folder(here / "runs/x/model", **classifier)
    values = changed(changed(example(command), "run", {"folder": "runs/x", "overwrite": True}), field, "runs/x/model")
    assert f"{field}: runs/x/model lies in run.folder, which this run writes into" in error_of(command, values)
    values = changed(values, "run.folder", "runs/y")
    load(command, write(values), ranks=2)


# Those of configs/ready are for their own numbers of ranks: see test_plan.py.
SHIPPED = [
    *(Path(gearshift.launch.__file__).parent / "demo").glob("*.yaml"),
    *(p for p in (Path(__file__).parents[2] / "configs").glob("*/*.yaml") if p.parent.name != "ready"),
]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_config_is_right(here: Path, path: Path) -> None:
    """Against each other too, once the files that it names are there: the model of each stage, rows for each reader."""
    command = {"flan": "sft", "t0": "sft"}.get(path.stem, path.stem.split("-")[0])
    config: Any = load(command, path)
    runs = [Path(config.run.folder).with_name(name) for name in ("pretrain", "sft", "flan", "t0", "ppo", "ppo-ptx")]
    more = ("models/base", "runs/instructgpt/sft-baseline/best/model", "runs/gsm8k/pretrain/model")
    for folder in {*(run / "model" for run in runs), *map(Path, more)}:
        model_folder(here / folder, max_position_embeddings=4096)
    scores = {"architectures": ["LlamaForSequenceClassification"]}
    for name in ("reward", "reward-first"):
        model_folder(Path(config.run.folder).with_name(name) / "model", max_position_embeddings=4096, **scores)
    row = {"text": "a", "prompt": "b", "completion": "c", "chosen": "d", "rejected": "e"}
    for _, sources, _ in readers(config):
        for source in sources:
            Path(source).parent.mkdir(parents=True, exist_ok=True)
            Path(source).write_text(json.dumps(row) + "\n")
    load(command, path, [("run.folder", "elsewhere")], ranks=2)


def test_which_configs_are_shipped() -> None:
    assert sorted(path.stem for path in SHIPPED) == sorted(
        ["sft", "flan", "t0", "reward", "ppo", "ppo-ptx", "compare"] * 3
        + ["pretrain"] * 2
        + ["compare-full", "sft-baseline", "reward-first", "reward"]
    )


def test_held_out_text_must_fit_the_models_positions(here: Path) -> None:
    model_folder(here / "long", max_position_embeddings=4096)
    values = changed(changed(example("ppo"), "ptx.validation", ["text.txt"]), "policy.init", "long")
    assert "ptx.max_tokens: 99999" in error_of("ppo", changed(values, "ptx.max_tokens", 99_999))


def test_pretraining_text_makes_it_ppo_ptx(here: Path) -> None:
    """InstructGPT's coefficient where there is text and none is said; plain PPO without text."""
    assert load("ppo", write(example("ppo"))).ptx.weight == 0.0  # type: ignore[attr-defined]
    assert load("ppo", write(changed(example("ppo"), "ptx", {"data": "text.txt"}))).ptx.weight == 27.8  # type: ignore[attr-defined]
    some = {"data": "text.txt", "coef": 0.5}
    assert load("ppo", write(changed(example("ppo"), "ptx", some))).ptx.weight == 0.5  # type: ignore[attr-defined]
