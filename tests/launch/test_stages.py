"""Whole runs on tiny models, through the real launcher, on two ranks: from the shell to a folder that loads."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gearshift.launch.processes import free_port
from tests.rlhf.test_ppo import METRICS
from tests.rlhf.tiny import prompt_rows, save_policy, save_reward_model, text_rows, write_jsonl
from tests.run_folder import unnamed

from .conftest import write

ITERATIONS, BATCH = 2, 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {"policy": str(save_policy(folder / "policy")), "reward": str(save_reward_model(folder / "reward"))}


def ppo_ptx(models: dict[str, str], prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """Two iterations of PPO-ptx, rollouts by both ranks together; every file in the current directory."""
    text = write_jsonl(Path("text.jsonl"), text_rows(12))
    return {
        "run": {"folder": "runs/ppo", "ranks": 2},
        "policy": {"init": models["policy"]},
        "reward": {"init": models["reward"]},
        "data": {
            "train": write_jsonl(Path("prompts.jsonl"), prompts),
            "validation": write_jsonl(Path("held.jsonl"), prompt_rows(15)[12:]),
            "max_prompt_tokens": 40,
        },
        "rollout": {"tp_size": 2, "max_new_tokens": 6},
        "ppo": {"episodes": ITERATIONS * BATCH, "batch_size": BATCH, "minibatches": 2, "samples_every": 1},
        "ptx": {"coef": 27.8, "data": [text], "validation": [text], "examples_per_episode": 1, "max_tokens": 12},
    }


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """A command of this environment's Python, with a core for each rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def check_run_folder(folder: Path) -> list[dict[str, Any]]:
    """Metrics under the names that other frameworks have, samples, and models that `transformers` loads."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == list(range(1, ITERATIONS + 1))
    for row in metrics:
        assert set(row) >= METRICS | {"loss/ptx_avg"}
    assert {"validation/scores", "loss/pretraining_heldout"} <= set(metrics[-1])
    model, info = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder / "model"))
    AutoModelForSequenceClassification.from_pretrained(folder / "critic")
    assert list((folder / "tensorboard").iterdir())
    assert unnamed(folder) == []
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


# In the order in which they begin.
PHASES = ["generation", "generation/shift", "score", "score/reward model", "score/reference"]
PHASES += ["score/critic", "train", "train/policy", "train/policy/forward and backward"]
PHASES += ["train/policy/optimizer step", "train/critic", "train/critic/forward and backward"]
PHASES += ["train/critic/optimizer step"]


def check_profile(folder: Path) -> None:
    """Both ranks' traces have the phases as ranges; the page's shares add up, and training is thrice the forward."""
    for rank in range(2):
        with gzip.open(folder / f"profile/rank{rank}.json.gz", "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        assert {"iteration", *PHASES} <= {e["name"] for e in events if e.get("cat") == "user_annotation"}
    page = (folder / "profile.md").read_text(encoding="utf-8")
    assert page.startswith("# Profile of gearshift ppo, iteration 2\n\nRank 0 of 2 ranks on the CPU; ")
    times, roofline = table(page, "Where the time goes"), table(page, "Against the machine")
    names = [row[0].count("&emsp;") * "  " + row[0].replace("&emsp;", "") for row in times]
    shown = [name.count("/") * "  " + name.split("/")[-1] for name in PHASES]
    assert names == [*shown, "between phases", "iteration"]
    shares = [float(row[2].removesuffix("%")) for row in times if "&emsp;" not in row[0]]
    assert shares[-1] == 100
    assert sum(shares[:-1]) == pytest.approx(100, abs=0.3)
    for row in times:
        assert sum(float(part.removesuffix("%")) for part in row[3:]) == pytest.approx(100, abs=0.2)
    flops = {row[0].replace("&emsp;", ""): float(row[1]) for row in roofline if row[1] != "-"}
    scored = next(float(row[1]) for row in roofline if row[0].endswith("critic"))
    # The critic's is last; a rank trains on other rows than it has scored.
    assert flops["forward and backward"] == pytest.approx(3 * scored, rel=0.06)
    assert scored > flops["reward model"]  # which is asked for the last token alone
    assert flops["score"] == pytest.approx(flops["reward model"] + flops["reference"] + scored, rel=0.02)


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the rows under a heading."""
    section = page.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line[2:-2].split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return rows[1:]


def test_ppo_from_the_shell(here: Path, models: dict[str, str]) -> None:
    """The text of a template on the command line reaches the ranks as it is; the finished run is not written over."""
    config = write(ppo_ptx(models, prompt_rows(12)))
    words = ["-m", "gearshift.launch", "ppo", config, "--data.prompt_template", "{prompt}\n"]
    done = run(*words, "--profile")
    assert done.returncode == 0, done.stderr
    assert "profile      runs/ppo/profile.md says where the time goes" in done.stderr
    assert "USDT" not in done.stderr
    assert "12 of 12 rows" in done.stderr
    assert "ppo: iteration 2/2, reward " in done.stderr
    samples = check_run_folder(Path("runs/ppo"))
    check_profile(Path("runs/ppo"))
    assert {row["prompt"] for row in samples} <= {f"{row['prompt']}\n" for row in prompt_rows(12)}
    again = run(*words)
    assert again.returncode == 2
    assert again.stderr == (
        f"gearshift ppo: {config}:2: run.folder: runs/ppo holds a finished run: choose another folder, or set "
        "run.overwrite: true\n"
    )


def pad_is_eos(folder: Path) -> Path:
    """The tiny policy as many published ones are: no pad token but EOS, no chat template."""
    from transformers import AutoTokenizer

    save_policy(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.chat_template is None
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": config["eos_token_id"]}))
    return folder


def test_ppo_by_the_deepspeed_launcher(here: Path, models: dict[str, str]) -> None:
    """`deepspeed --module gearshift.launch.ppo`, with what must simply work: long prompts, pad = EOS, no template."""
    long = [{"prompt": "x" * 200}, {"messages": [{"role": "user", "content": "y" * 41}]}]
    values = ppo_ptx({**models, "policy": str(pad_is_eos(here / "policy"))}, [*prompt_rows(5), *long])
    words = ["--num_accelerators", "2", "--master_port", str(free_port()), "--module", "gearshift.launch.ppo"]
    done = run("-m", "deepspeed.launcher.runner", *words, "--config", write(values))
    assert done.returncode == 0, done.stderr
    assert "data.train: 5 of 7 rows; left out: 2 over data.max_prompt_tokens=40" in done.stderr
    samples = check_run_folder(Path("runs/ppo"))
    assert {row["prompt"] for row in samples} <= {row["prompt"] for row in prompt_rows(5)}
    assert any(row["finished"] for row in samples)
