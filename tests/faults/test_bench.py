"""`gearshift bench` through the real launcher on two ranks: on the models of a run, on a folder, on nothing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from gearshift.rlhf.bench import PHASES
from tests.launch.conftest import here  # noqa: F401
from tests.launch.test_stages import BATCH, ppo_ptx, run
from tests.rlhf.tiny import prompt_rows, save_policy, save_reward_model

RESPONSE = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {"policy": str(save_policy(folder / "policy")), "reward": str(save_reward_model(folder / "reward"))}


def bench(*words: str) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    """The figures of `gearshift bench`, which leaves nothing else in the current directory."""
    before = sorted(path.name for path in Path().iterdir())
    done = run("-m", "gearshift.launch", "bench", *words, "--iterations", "2", "--out", "found.json")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in Path().iterdir()) == sorted([*before, "found.json"])
    found = json.loads(Path("found.json").read_text())
    assert len(found["iterations"]) == 2
    for rank in (rank for ranks in found["iterations"] for rank in ranks):
        assert sum(rank[name] for name in PHASES) == pytest.approx(rank["step"])
        assert min(rank[name] for name in ("shift", "generation", "score", "policy", "step")) > 0
        assert 0 <= rank["rest"] < 0.2 * rank["step"]
        assert rank["bytes_between_hosts"] == 0
    for held, peak in zip(found["memory_before_models"], found["memory_peak"], strict=True):
        assert 0 < held < peak
    return found, done


def test_the_models_data_and_batches_of_a_ppo_config(here: Path, models: dict[str, str]) -> None:  # noqa: F811
    """PPO-ptx, TP 2. Prompts are those of the config: of some 5 to 12 bytes, not of 40."""
    # Else DeepSpeed keeps weights as small as these whole on every rank, and none would be lacking.
    cut_up = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    Path("config.yaml").write_text(yaml.safe_dump(ppo_ptx(models, prompt_rows(12)) | cut_up))
    found, done = bench("config.yaml")
    assert "data.train: 12 of 12 rows" in done.stderr
    assert "3 iterations make 12 episodes" in done.stderr
    assert "optimizer    2 steps per iteration (2 minibatches x 1 epoch), 6 in total" in done.stderr
    assert (found["ranks"], found["tp_size"], found["batch_size"]) == (2, 2, BATCH)
    assert all(rank["critic"] > 0 for rank in found["iterations"][0])
    first = found["iterations"][0][0]
    assert BATCH <= first["response_tokens"] <= BATCH * RESPONSE
    assert first["tokens"] - first["response_tokens"] < BATCH * 15
    # TP 2 on one host: each rank lacks of the split weights what it does not hold, less than half of all.
    assert 0 < first["bytes_inside_host"] < 4 * found["parameters"] / 2
    lines = [line for line in done.stdout.splitlines() if line.startswith(("whole step", "shift inside", "peak"))]
    assert len(lines) == 5


def test_a_folder_alone(here: Path, models: dict[str, str]) -> None:  # noqa: F811
    """Reward model and critic are the policy's backbone with a new head; prompts are random, of the length asked for;
    without a critic there is none."""
    small = ["--data.max_prompt_tokens", "9", "--rollout.max_new_tokens", str(RESPONSE), "--ppo.batch_size", "8"]
    grouped = ["--ppo.advantage", "grpo", "--ppo.answers", "2"]
    found, _ = bench("--model", models["policy"], *small, *grouped)
    first = found["iterations"][0][0]
    assert first["tokens"] - first["response_tokens"] == pytest.approx(8 * 9)
    assert first["critic"] < 0.01 * first["step"]


def test_nothing_at_all(here: Path) -> None:  # noqa: F811
    """Random models of sizes on the command line; answers as long as they may be, but for a few that end by chance."""
    sizes = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    words = [word for name, size in sizes.items() for word in (f"--policy.config.{name}", str(size))]
    found, done = bench(*words, "--rollout.tp_size", "2", "--rollout.max_new_tokens", "20")
    layer = 4 * 48 * 48 + 3 * 48 * 64 + 2 * 48
    assert found["parameters"] == 2 * 300 * 48 + 2 * layer + 48
    assert found["dtype"] == "float32"
    assert f"by a policy of {found['parameters']:,} parameters; 2 of them" in done.stdout
    assert found["iterations"][0][0]["response_tokens"] > 0.8 * 16 * 20
