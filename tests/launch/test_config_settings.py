"""One setting that is wrong, in an otherwise right config, and the line that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import changed, error_of, example, model_folder

# (setting, value, what the line must say after "config.yaml:LINE: ")
WRONG = [
    ("ppo.batch_siz", 64, "ppo.batch_siz: unknown setting; did you mean ppo.batch_size?"),
    ("pp0", {}, "pp0: unknown setting; did you mean ppo?"),
    ("tp_size", 2, "tp_size: unknown setting; did you mean rollout.tp_size?"),
    ("ppo.xylophone", 1, "ppo.xylophone: unknown setting; the settings of ppo are episodes, batch_size"),
    ("ppo.batch_size", "many", "ppo.batch_size: should be a valid integer, not 'many'"),
    ("ppo.batch_size", "64", "ppo.batch_size: should be a valid integer, not '64'"),
    ("ppo.batch_size", True, "ppo.batch_size: should be a valid integer, not True"),
    ("ppo.clip", -1, "ppo.clip: should be greater than 0, not -1"),
    ("ppo.kl.estimator", "k4", "ppo.kl.estimator: should be 'k1', 'k2', 'k3' or 'exact', not 'k4'"),
    ("ppo", 5, "ppo: should be a section (key: value pairs), not 5"),
    ("run.dtype", "fp16", "run.dtype: fp16 is not supported (no loss scaling): use bf16 or fp32, not 'fp16'"),
    ("run.folder", ..., "run.folder: missing: Run folder"),
    ("reward", ..., "reward: missing: a section"),
    ("deepspeed.train_batch_size", 8, "deepspeed.train_batch_size: this key is Gearshift's: set ppo.batch_size or"),
    ("deepspeed.zero_optimization.stage", 2, "deepspeed.zero_optimization.stage: this key is Gearshift's"),
    ("deepspeed.fp16", {"enabled": True}, "deepspeed.fp16: this key is Gearshift's: fp16 is not supported"),
    (
        "deepspeed.zero_optimization.zero_hpz_partition_size",
        2,
        "deepspeed.zero_optimization.zero_hpz_partition_size: rollouts do not support a second partition (hpZ)",
    ),
    (
        "deepspeed.zero_optimization.offload_param",
        {"device": "nvme", "nvme_path": "swap"},
        "deepspeed.zero_optimization.offload_param: rollouts do not support weights on NVMe (use device: cpu)",
    ),
    ("run.ranks", 4, "run.ranks: 4, but the launcher starts 2 processes: leave run.ranks out"),
    ("rollout.top_k", 0, "rollout.top_k: should be greater than or equal to 1, not 0"),
    ("rollout.top_p", 0.0, "rollout.top_p: should be greater than 0, not 0.0"),
    ("rollout.top_p", 1.5, "rollout.top_p: should be less than or equal to 1, not 1.5"),
    (
        "rollout.stop",
        ["\n", ""],
        "rollout.stop: should hold no empty text, which would end every response at once, not",
    ),
    ("rollout.stop", "", "rollout.stop: should hold no empty text"),
    ("ppo.answers", 3, "ppo.batch_size: 64 does not divide by ppo.answers = 3: use 48 or 72"),
    (
        "ppo.advantage",
        "grpo",
        "ppo.answers: ppo.advantage: grpo compares the answers to a prompt: set 2 or more",
    ),
    ("ppo.kl", {"where": "loss"}, "ppo.kl.estimator: k1 is no penalty in a loss (ppo.kl.where: loss): use k3 or k2"),
    (
        "ppo.importance_cap",
        2.0,
        "ppo.importance_cap: weighs the training forward's log-probs against the rollout's",
    ),
    ("ppo.critic_iterations", 10, "ppo.critic_iterations: 10 leaves none of the 10 iterations for the policy"),
    (
        "ppo.kl",
        {"horizon": 99},
        "ppo.kl.horizon: only with ppo.kl.target, without which ppo.kl.coef stays: leave it out",
    ),
    ("ppo.best_kl", 1.0, "ppo.best_kl: needs validation: set data.validation and ppo.validate_every"),
    (
        "deepspeed.zero_optimization.offload_optimizer",
        {"device": "nvme", "nvme_path": "swap"},
        "ppo.ema: needs the optimizer's weights in memory, not on NVMe: set it to null",
    ),
    ("ppo.ema", 1.0, "ppo.ema: should be less than 1, not 1.0"),
    ("ppo.dual_clip", 1.0, "ppo.dual_clip: should be greater than 1, not 1.0"),
    ("rollout.tp_size", 3, "rollout.tp_size: 3 does not divide the 2 ranks (run.ranks): use 1 or 2"),
    ("ppo.batch_size", 63, "ppo.batch_size: 63 does not divide by the 2 ranks (run.ranks): use 56 or 64"),
    ("ppo.batch_size", 62, "ppo.batch_size: 62 does not divide by ppo.minibatches = 4: use 56 or 64"),
    (
        "ppo.minibatches",
        64,
        "ppo.minibatches: 64 makes minibatches of 1 episodes (of ppo.batch_size = 64), which do not divide by the "
        "2 ranks (run.ranks): use 1, 2, 4, 8, 16 or 32",
    ),
    (
        "run.profile",
        {"iterations": 2, "after": 9},
        "run.profile: 2 to profile after 9 (run.profile.after), but the run has 10 iterations: "
        "use run.profile.after: 0 or more ppo.episodes",
    ),
    ("run.profile.iterations", 11, "run.profile: 11 to profile after 1 (run.profile.after), but the run has 10 itera"),
    ("ppo.episodes", 650, "ppo.episodes: 650 does not divide by ppo.batch_size = 64: use 640 or 704"),
    ("ptx.coef", 27.8, "ptx.data: needed with ptx.coef above 0"),
    (
        "ptx",
        {"data": "text.txt", "coef": 0},
        "ptx.data: with ptx.coef 0 this is plain PPO: leave ptx.coef out (27.8, as",
    ),
    ("ptx.validation", "nowhere.txt", "ptx.validation: there is no file nowhere.txt"),
    ("ppo.kl", {"target": 6.0, "coef": 0}, "ppo.kl.coef: 0 times anything stays 0, so ppo.kl.target would do nothing"),
    ("ppo.kl", {"target": 6.0, "horizon": 12}, "ppo.kl.horizon: 12 is so short that one iteration of ppo.batch_size"),
    ("optimizer.betas", [0.9, 1.0], "optimizer.betas: should be two numbers from 0 to below 1, not [0.9, 1.0]"),
    ("optimizer.betas", [-0.1, 0.9], "optimizer.betas: should be two numbers from 0 to below 1, not [-0.1, 0.9]"),
    ("data.prompt_template", "Q:", "data.prompt_template: should hold {prompt} once, not 'Q:'"),
    ("data.prompt_template", "{prompt} {prompt}", "data.prompt_template: should hold {prompt} once"),
    (
        "data.chat_template",
        True,
        "data.chat_template: the tokenizer of sft has no chat template (tokenizer_config.json",
    ),
    ("data.train", "unasked.jsonl", "data.train: unasked.jsonl:2: the prompt is empty, so there is nothing to answer"),
    ("data.train", "half.jsonl", "data.train: half.jsonl:2: field 'prompt' is not Unicode text: half a surrogate pair"),
    ("data.train", "nowhere.jsonl", "data.train: there is no file nowhere.jsonl"),
    ("data.train", "empty.jsonl", "data.train: empty.jsonl is empty"),
    ("data.train", "sft", "data.train: sft is a folder: name its files"),
    ("data.train", "sft/config.json", "data.train: sft/config.json is none of .jsonl, .jsonl.gz, .parquet, .txt"),
    ("data.train", [], "data.train: missing: sources"),
    ("data.train", "blank.jsonl", "data.train: blank.jsonl: the data set is empty"),
    ("data.train", "text.txt", "data.train: text.txt:1: no field 'prompt'; the row has: text"),
    ("data.train", "ragged.jsonl", "data.train: ragged.jsonl:3: no field 'prompt'; the row has: question"),
    ("data.train", "broken.jsonl", "data.train: broken.jsonl:2: is not valid JSON"),
    ("data.prompt_key", "question", "data.train: prompts.jsonl:1: no field 'question'; the row has: prompt"),
    ("ptx.validation", "prompts.jsonl", "ptx.validation: prompts.jsonl:1: no field 'text'; the row has: prompt"),
    ("data.vocab_size", 257, "data.vocab_size: should be greater than or equal to 258, not 257"),
    ("data.vocab_size", 258, "data.vocab_size: only with data.tokenizer: train"),
    ("data.tokenizer", "train", "data.tokenizer: train is for gearshift pretrain"),
    ("data.tokenizer", "bare", "data.tokenizer: bare has no tokenizer (tokenizer.json)"),
    ("policy.lora", {"rank": 0}, "policy.lora.rank: should be greater than or equal to 1, not 0"),
    ("policy.init", "nowhere", "policy.init: there is no model folder nowhere"),
    ("policy.init", "sft/model", "policy.init: there is no model folder sft/model"),
    ("policy.init", "finished", "policy.init: finished has no config.json: did you mean finished/model?"),
    ("policy.init", "reward", "policy.init: reward is a LlamaForSequenceClassification, which cannot write text"),
    ("policy.init", "config", "policy.init: config (new weights) is for gearshift pretrain"),
    (
        "policy.config",
        {"model_type": "llama"},
        "policy.config: only with policy.init: config, not with policy.init: sft",
    ),
    ("policy.init", "short", "rollout.max_new_tokens: 1024, with data.max_prompt_tokens = 1024, is more than the 512"),
    (
        "policy.init",
        "three-heads",
        "rollout.tp_size: 2 does not divide the 3 attention heads (3 for keys) of three-heads",
    ),
    (
        "policy.init",
        "odd-keys",
        "rollout.tp_size: 2 does not divide the 6 attention heads (3 for keys) of odd-keys: use 1",
    ),
    ("policy.init", "three-gpt2-heads", "rollout.tp_size: 2 does not divide the 3 attention heads (3 for keys)"),
    (
        "policy.init",
        "planless",
        "rollout.tp_size: biogpt: neither transformers nor Gearshift has a tensor-parallel plan",
    ),
    (
        "policy.init",
        "longrope",
        "rollout.max_new_tokens: 1024, with data.max_prompt_tokens = 1024, is more than the 2000 positions of longrope",
    ),
    ("reward.init", "sft", "reward.init: sft is a LlamaForCausalLM, not a reward model"),
    (
        "reward.init",
        "foreign",
        "critic.init: the tokenizer of the reward model foreign is not that of sft, so it cannot start the critic",
    ),
    ("critic.init", "foreign", "critic.init: the tokenizer of foreign is not that of sft"),
    ("reference.init", "foreign-lm", "reference.init: its tokenizer is not that of sft"),
    (
        "policy.init",
        "few-rows",
        "policy.init: few-rows: its config.json has vocab_size 3, but the tokenizer has 4 token",
    ),
    (
        "reference.init",
        "few-rows",
        "reference.init: few-rows: its config.json has vocab_size 3, but the tokenizer has 4",
    ),
    ("reward.init", "few-scores", "reward.init: few-scores: its config.json has vocab_size 3, but the tokenizer has 4"),
    ("critic.init", "few-scores", "critic.init: few-scores: its config.json has vocab_size 3, but the tokenizer has 4"),
    ("policy.init", "broken", "policy.init: broken/config.json: should hold a JSON object, not a list"),
    ("policy.init", "cut", "policy.init: cut/model.safetensors: is not a whole safetensors file: copy it there again"),
    ("policy.init", "sharded", "policy.init: sharded/b.safetensors: is missing, though model.safetensors.index.json"),
    ("data.tokenizer", "no-json", "data.tokenizer: no-json/tokenizer.json: is not JSON: "),
    ("reference.init", "no-json", "reference.init: no-json/tokenizer.json: is not JSON: "),
    ("tracking.trackers", ["wand"], "tracking.trackers: wand is unknown: use some of tensorboard, wandb"),
]


@pytest.mark.parametrize(("setting", "value", "says"), WRONG, ids=[f"{s}={v}"[:40] for s, v, _ in WRONG])
def test_what_is_wrong_with_ppo(here: Path, setting: str, value: Any, says: str) -> None:
    Path("empty.jsonl").touch()
    Path("blank.jsonl").write_text("\n\n")
    Path("ragged.jsonl").write_text('{"prompt": "a"}\n\n{"question": "b"}\n')
    Path("broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    Path("bare").mkdir()
    model_folder(here / "finished" / "model")
    model_folder(here / "short", max_position_embeddings=512)
    model_folder(here / "three-heads", num_attention_heads=3)
    model_folder(here / "odd-keys", num_attention_heads=6, num_key_value_heads=3)
    model_folder(here / "three-gpt2-heads", model_type="gpt2", num_attention_heads=None, n_head=3)
    model_folder(here / "planless", model_type="biogpt")
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 2000}
    model_folder(here / "longrope", model_type="phi3", rope_parameters=rope)
    model_folder(here / "foreign", {"a": 0, "c": 1}, architectures=["LlamaForSequenceClassification"])
    model_folder(here / "foreign-lm", {"a": 0, "c": 1})
    Path("unasked.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    Path("half.jsonl").write_text('{"prompt": "\\ud83d\\ude00"}\n{"prompt": "a \\ud83d"}\n')
    model_folder(here / "few-rows", vocab_size=3)
    model_folder(here / "few-scores", vocab_size=3, architectures=["LlamaForSequenceClassification"])
    (model_folder(here / "broken") / "config.json").write_text("[]")
    (model_folder(here / "cut") / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{")
    sharded = model_folder(here / "sharded")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"two": "b.safetensors"}}))
    (model_folder(here / "no-json") / "tokenizer.json").write_text("{")
    text = error_of("ppo", changed(example("ppo"), setting, value))
    where, message = text.split(": ", 1)
    assert message.startswith(says)
    assert where.startswith("config.yaml")


# (command, setting, value, what the line must say)
WRONG_ELSEWHERE = [
    ("sft", "train.batch_size", 7, "train.batch_size: 7 does not divide by the 2 ranks (run.ranks): use 6 or 8"),
    ("sft", "train.batch_size", 1, "train.batch_size: 1 does not divide by the 2 ranks (run.ranks): use 2"),
    ("sft", "train.pretraining_fraction", 0.1, "train.pretraining: needed with train.pretraining_fraction above 0"),
    ("sft", "train.pretraining", "text.txt", "train.pretraining_fraction: 0, so train.pretraining would not be read"),
    ("sft", "train.best", "score", "reward.init: needed with train.best: score"),
    ("sft", "reward.init", "reward", "reward.init: only train.best: score reads it"),
    ("sft", "train.residual_dropout", 1.0, "train.residual_dropout: should be less than 1"),
    ("reward", "train.pretraining_fraction", 0.1, "train.pretraining_fraction: unknown setting"),
    ("reward", "data.demonstrations", "none.jsonl", "data.demonstrations: there is no file none.jsonl"),
    ("sft", "data.demonstrations", "none.jsonl", "data.demonstrations: unknown setting"),
    ("pretrain", "data.vocab_size", ..., "data.vocab_size: needed with data.tokenizer: train"),
    ("pretrain", "data.tokenizer", ..., "data.tokenizer: needed with policy.init: config"),
    ("pretrain", "policy.config.model_type", ..., "policy.config.model_type: missing"),
    ("pretrain", "policy.config.max_position_embeddings", 64, "data.max_tokens: 2048 is more than the model's 64"),
    (
        "pretrain",
        "policy.config.num_hiden_layers",
        2,
        "policy.config.num_hiden_layers: a llama config has no such field; did",
    ),
    (
        "pretrain",
        "policy.config.num_attention_heads",
        0,
        "policy.config.num_attention_heads: should be a whole number of",
    ),
    ("pretrain", "policy.config.hidden_size", 65, "policy.config: "),
    ("pretrain", "policy.config.hidden_act", "grelu", "policy.config: no llama can be built from it: KeyError: "),
    ("pretrain", "data.vocab_size", 100, "data.vocab_size: should be greater than or equal to 258, not 100"),
    ("reward", "data.train", "asked-nothing.jsonl", "data.train: asked-nothing.jsonl:1: the prompt is empty"),
    (
        "compare",
        "reference.init",
        "foreign",
        "reference.init: its tokenizer is not that of sft: use a model with the same",
    ),
    ("compare", "systems.ppo", {"init": "foreign"}, "systems.ppo.init: its tokenizer is not that of sft: use a model"),
    ("compare", "data.prompt_template", "Q:", "data.prompt_template: should hold {prompt} once, not 'Q:'"),
    ("compare", "systems", {}, "systems: Dictionary should have at least 1 item"),
    ("compare", "systems.ppo", {"init": "nowhere"}, "systems.ppo.init: there is no model folder nowhere"),
    ("compare", "systems.ppo", {"int": "sft"}, "systems.ppo.int: unknown setting"),
    ("compare", "data.validation", [], "data.validation: missing: sources"),
    ("compare", "data.train", "prompts.jsonl", "data.train: gearshift compare trains nothing"),
    ("compare", "ptx.coef", 1.0, "ptx.coef: gearshift compare trains nothing"),
    ("compare", "compare.against", "ppo", "compare.against: ppo is none of the systems: use one of sft"),
    ("compare", "systems.sft.prefixes", ["Q: "], "compare.selection: needed with systems.sft.prefixes: sources of"),
    (
        "compare",
        "systems.sft",
        {"init": "sft", "prefix": "Q: ", "prefixes": ["A: "]},
        "systems.sft.prefix: prefixes are given to choose from: leave out one of the two",
    ),
    ("compare", "compare.selection", "prompts.jsonl", "compare.selection: no system has prefixes to choose from"),
    ("compare", "systems.sft.top_p", 0.0, "systems.sft.top_p: should be greater than 0, not 0.0"),
    ("sft", "data.train", "prompts.jsonl", "data.train: prompts.jsonl:1: no field 'completion'"),
    ("sft", "data.validation", "text.txt", "data.validation: text.txt:1: no field 'prompt'"),
    ("reward", "data.train", "prompts.jsonl", "data.train: prompts.jsonl:1: no field 'chosen'"),
    ("reward", "data.demonstrations", "pairs.jsonl", "data.demonstrations: pairs.jsonl:1: no field 'completion'"),
    ("reward", "policy.lora", {}, "policy.lora: is for sft and ppo; a reward model trains all of its weights"),
    ("pretrain", "policy.lora", {}, "policy.lora: adapters go beside trained weights, and policy.init: config has"),
    ("pretrain", "data.train", "prompts.jsonl", "data.train: prompts.jsonl:1: no field 'text'"),
    ("pretrain", "data.tokenizer_text", "prompts.jsonl", "data.tokenizer_text: prompts.jsonl:1: no field 'text'"),
]


@pytest.mark.parametrize(("command", "setting", "value", "says"), WRONG_ELSEWHERE)
def test_what_is_wrong_with_the_others(here: Path, command: str, setting: str, value: Any, says: str) -> None:
    Path("asked-nothing.jsonl").write_text('{"prompt": "", "chosen": "a", "rejected": "b"}\n')
    model_folder(here / "foreign", {"a": 0, "c": 1})
    text = error_of(command, changed(example(command), setting, value))
    assert text.split(": ", 1)[1].startswith(says)


def test_prefixes_are_not_chosen_on_the_prompts_of_the_comparison(here: Path) -> None:
    values = changed(example("compare"), "systems.sft.prefixes", ["Q: "])
    values = changed(values, "compare.selection", "prompts.jsonl")
    assert "compare.selection: prompts.jsonl is also in data.validation: choose on" in error_of("compare", values)


def test_a_system_is_checked_with_its_own_settings(here: Path) -> None:
    model_folder(here / "small", max_position_embeddings=2048, vocab_size=4)
    for setting, value, says in (
        (
            "max_new_tokens",
            1500,
            "systems.other.max_new_tokens: 1500, with data.max_prompt_tokens = 1024, is more than",
        ),
        ("top_k", 5, "systems.other.top_k: 5 is more than the 4 tokens of small"),
    ):
        values = changed(example("compare"), "systems.other", {"init": "small", setting: value})
        assert says in error_of("compare", values)
