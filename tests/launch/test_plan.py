"""`gearshift plan`: figures of a small model, and each mistake in one line."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from gearshift.errors import UserError
from gearshift.launch.config import load
from gearshift.launch.plan import main

from .conftest import example, model_folder, write

ROOT = Path(__file__).parents[2]
READY = ROOT / "configs/ready"
LLAMA = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "vocab_size": 512, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip


def ready_commands() -> list[list[str]]:
    """What follows `gearshift plan` in the README of the ready configs."""
    lines = (READY / "README.md").read_text(encoding="utf-8").splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith("    gearshift plan")]


@pytest.fixture
def config(here: Path) -> dict[str, Any]:
    """A config whose policy has a shape."""
    shutil.rmtree("sft")
    model_folder(here / "sft", **LLAMA)
    shutil.rmtree("reward")
    model_folder(here / "reward", **{**LLAMA, "architectures": ["LlamaForSequenceClassification"]})
    values = example("ppo")
    values["data"]["max_prompt_tokens"] = 64
    values["rollout"]["max_new_tokens"] = 64
    return values


def plan(values: dict[str, Any], *more: str) -> int:
    return main([write(values), "--gpus", "2", *more])


def test_it_counts_what_a_rank_holds(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(config, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    policy = found["models"]["policy"]["parameters"]
    backbone = 512 * 64 + 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128 + 2 * 64) + 64
    assert policy == backbone + 512 * 64
    held = found["held"]["policy"]
    assert held["weights"] == policy // 2 * 2
    assert held["gradients"] == held["average"] == policy // 2 * 4
    assert held["optimizer"] == 3 * policy // 2 * 4
    assert held["bucket"] == policy * 4
    assert found["held"]["reference"] == {**dict.fromkeys(held, 0), "weights": policy, "whole": held["whole"]}
    phases = {phase["name"]: phase["parts"] for phase in found["phases"]}
    positions, rows = 256, 64  # of the cache: whole blocks; all answers of the one group at once
    assert phases["rollout"]["KV cache"] == 2 * 2 * rows * positions * 16 * 2
    assert found["tokens_per_iteration"] == {"all": 64 * 128, "written": 64 * 64}
    assert found["fits"]


def test_lora_trains_less_and_needs_no_reference(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    assert plan(config, "--json", "--policy.lora.rank", "4") == 0
    found = json.loads(capsys.readouterr().out)
    assert "reference" not in found["models"]
    assert found["held"]["policy"]["gradients"] < found["held"]["critic"]["gradients"] // 4


def test_frozen_models_may_lie_in_host_memory(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    config["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    found = []
    for offload in ("false", "true"):
        assert plan(config, "--json", "--reference.offload", offload, "--reward.offload", offload) == 0
        found.append(json.loads(capsys.readouterr().out))
    kept, away = (one["held"] for one in found)
    for name in ("reference", "reward"):
        assert (away[name]["weights"], away[name]["host"]) == (0, kept[name]["weights"])
    assert away["policy"] == kept["policy"]
    assert found[1]["host_bytes"] == kept["reference"]["weights"] + kept["reward"]["weights"]


def test_activations_may_be_computed_again(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """And that is told where nothing that costs less time would do."""
    config["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": 1_000_000}}
    config["data"]["max_prompt_tokens"], config["ppo"]["micro_batch_size"] = 448, 1
    config["rollout"] |= {"slots": 1, "keep_weights": False}
    peaks = []
    for again in ("false", "true"):
        assert plan(config, "--json", "--optimizer.gradient_checkpointing", again) == 0
        phases = json.loads(capsys.readouterr().out)["phases"]
        peaks.append(max(phase["total"] for phase in phases))
    kept, less = peaks
    assert plan(config, "--json", "--memory-gb", str(4 + (less + 0.1 * (kept - less)) / 1e9)) == 1
    fields = [change["field"] for change in json.loads(capsys.readouterr().out)["changes"]]
    assert fields == ["optimizer.gradient_checkpointing"]


def test_what_does_not_fit_says_what_to_change(
    config: dict[str, Any], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # More parameters than the bucket holds gradients, which DeepSpeed then reduces as they come.
    large = {**LLAMA, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 10, "vocab_size": 32_000}
    for name, head in (("sft", {}), ("reward", {"architectures": ["LlamaForSequenceClassification"]})):
        shutil.rmtree(name)
        model_folder(here / name, **large, **head)
    peaks = []
    for bucket in (500_000_000, 50_000_000):
        config["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": bucket}}
        assert plan(config, "--json") == 0
        peaks.append(max(phase["total"] for phase in json.loads(capsys.readouterr().out)["phases"]))
    del config["deepspeed"]
    assert plan(config, "--memory-gb", str(4 + sum(peaks) / 2e9)) == 1
    out = capsys.readouterr().out
    assert out.startswith("DOES NOT FIT")
    assert "  deepspeed.zero_optimization.reduce_bucket_size: 50000000   -> " in out


def test_no_setting_is_named_that_the_last_one_makes_needless(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """To let the rollout weights go would not do, and the optimizer's state on the host does alone."""
    config["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": 1000}}
    config["rollout"] |= {"slots": 1, "max_new_tokens": 2}
    config["ppo"]["micro_batch_size"], config["data"]["max_prompt_tokens"] = 1, 2
    assert plan(config, "--json") == 0
    phases = json.loads(capsys.readouterr().out)["phases"]
    optimizer, peak = phases[0]["parts"]["optimizer"], max(phase["total"] for phase in phases)
    assert plan(config, "--json", "--memory-gb", str(4 + (peak - 0.9 * optimizer) / 1e9)) == 1
    fields = [change["field"] for change in json.loads(capsys.readouterr().out)["changes"]]
    assert fields == ["deepspeed.zero_optimization.offload_optimizer"]


def test_small_models_are_counted_by_the_parameter(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(config) == 0
    assert "models       policy 139,584 (trained)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpu", "h100"], "--gpu: h100 is unknown; did you mean h100-80g? Known: b200-180g, h200-141g"),
        (["--gpus", "3"], "config.yaml: ppo.batch_size: 64 does not divide by the 3 ranks (run.ranks): use 60 or 72"),
        (["--rollout.tp_size", "3"], "config.yaml: rollout.tp_size: 3 does not divide the 2 ranks (run.ranks)"),
        (["--gpus", "0"], "'0' is not a whole number above 0"),
        (["--gpus-per-host", "x"], "'x' is not a whole number above 0"),
        (["--model", "actor=sft"], "--model: actor is no model of a PPO run: use policy, critic, reference, reward"),
        (["--model", "policy=nowhere"], "policy.init: the plan needs the shape of nowhere, and there is no"),
        (["--rollout.max_new_tokens", "480"], "rollout.max_new_tokens: 480, with data.max_prompt_tokens = 64, is more"),
        (["--ppo.clipp", "1"], "command line: ppo.clipp: unknown setting; did you mean ppo.clip?"),
        (["--run.ranks", "4"], "run.ranks: 4, but the plan is for --gpus 2"),
    ],
)
def test_a_mistake_is_one_line(config: dict[str, Any], more: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(config, *more)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_heads_that_do_not_divide(config: dict[str, Any], here: Path) -> None:
    odd = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}
    model_folder(here / "odd", **{**LLAMA, **odd})
    with pytest.raises(UserError, match=r"rollout.tp_size: 2 does not divide the model's 3 attention heads"):
        plan(config, "--model", "odd")


def test_a_config_of_another_command(here: Path) -> None:
    with pytest.raises(UserError, match=r"config.yaml: train: a config of gearshift pretrain, sft or reward"):
        main([write(example("sft"))])


@pytest.mark.parametrize("words", ready_commands(), ids=" ".join)
def test_a_ready_config_is_right(words: list[str], here: Path) -> None:
    """With its models and data in place; that it fits is in tests/faults, since it takes a minute."""
    name, *rest = words
    values = dict(zip(rest[::2], rest[1::2], strict=True))
    overrides = [(key[2:], value) for key, value in values.items() if "." in key]
    path = ROOT / name
    for field in ("policy", "reward"):
        folder = Path(getattr(load("ppo", path), field).init)
        heads = "LlamaForSequenceClassification" if field == "reward" else "LlamaForCausalLM"
        if not folder.exists():
            model_folder(here / folder, architectures=[heads], num_attention_heads=64, num_key_value_heads=8)
    Path("data").mkdir()
    for file in ("prompts", "prompts_validation"):
        Path(f"data/{file}.jsonl").write_text('{"prompt": "2 + 2 ="}\n')
    load("ppo", path, overrides, ranks=int(values["--gpus"]))
