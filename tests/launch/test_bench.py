"""`gearshift bench`: what it is started with, each mistake in one line, and the figures worked out by hand.

Real ranks are in tests/faults/test_bench.py and test_hosts.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from gearshift.launch import launcher
from gearshift.launch.bench import RANDOM, SHORT, main
from gearshift.launch.bench_table import summary, table
from gearshift.launch.config import load
from gearshift.launch.overrides import parse_arguments

from .conftest import changed, example, model_folder, write


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The launcher's command lines, in place of processes."""
    found: list[list[str]] = []
    monkeypatch.setattr(launcher, "run_to_end", lambda words, environment, job: found.append(words) or 0)
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_is_measured_without_a_config_can_run(here: Path, ranks: int) -> None:
    config: Any = load("bench", RANDOM, ranks=ranks)
    assert config.all_of_one_shape
    assert (config.bench.iterations, config.bench.warmup) == (3, 1)


def test_its_options_are_settings(here: Path, started: list[list[str]]) -> None:
    words = ["--model", "sft", "--iterations", "5", "--out", "found.json", "--run.ranks", "4"]
    assert main(words) == 0
    assert "--num_accelerators 4" in " ".join(started[0])
    assert started[0][started[0].index("--config") :] == [
        *("--config", str(RANDOM), "--policy.init", "sft", "--policy.config", "null"),
        *("--bench.iterations", "5", "--bench.out", "found.json", "--run.ranks", "4"),
    ]
    config: Any = load("bench", RANDOM, parse_arguments(words, SHORT).overrides, ranks=4)
    assert (config.policy.init, config.policy.config, config.bench.iterations) == ("sft", None, 5)


def test_a_config_of_ppo_is_taken_as_it_is(here: Path, started: list[list[str]]) -> None:
    """Also with a finished run in its folder, whose file `stop` stays, with a batch that does not divide the run's
    episodes, and with trackers that are not here: none of it is used."""
    values = changed(example("ppo"), "tracking", {"trackers": ["comet_ml"]})
    values["ppo"]["batch_size"] = 48
    (here / "runs/ppo/model").mkdir(parents=True)
    (here / "runs/ppo/stop").touch()
    assert main([write(values)]) == 0
    assert started[0][-2:] == ["--config", "config.yaml"]
    assert (here / "runs/ppo/stop").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--iterations", "0"], "command line: bench.iterations: should be greater than or equal to 1"),
        (["--out", "none/found.json"], "command line: bench.out: there is no folder none (relative to "),
        (["--out", "runs"], "command line: bench.out: runs is a folder: name a file in it"),
        (["--model", "nowhere"], "command line: policy.init: there is no model folder nowhere"),
        (["--model", "reward"], "command line: policy.init: reward is a LlamaForSequenceClassification, which cannot"),
        (["--reward.init", "reward"], "command line: reward.init: reward needs a policy that is not random"),
        (["--data.train", "prompts.jsonl"], "command line: data.train: a random model reads random tokens"),
        (["--model", "sft", "--reference.init", "sft"], "command line: reference.init: with reward.init: policy all"),
        (["--policy.config.hidden", "64"], "command line: policy.config.hidden: a llama config has no such field"),
        (["--run.ranks", "3"], ":16: ppo.batch_size: 16 does not divide by the 3 ranks (run.ranks)"),
        (["--model", "sft", "--rollout.tp_size", "4", "--run.ranks", "2"], "command line: rollout.tp_size: 4 does not"),
        (["--rollout.max_new_tokens", "4090"], "command line: rollout.max_new_tokens: 4090, with data.max_prompt_toke"),
        (["--resume", "auto"], "--resume is not an option"),
    ],
)
def test_mistakes(
    here: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    (here / "runs").mkdir()
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.removeprefix("gearshift bench: ").removeprefix(str(RANDOM)).startswith(says)
    assert started == []


def test_a_model_of_its_own_needs_its_tokenizer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_folder(here / "bare")
    (here / "bare/tokenizer.json").unlink()
    assert main(["--model", "bare"]) == 2
    assert "policy.init: bare has no tokenizer" in capsys.readouterr().err
    shutil.rmtree("bare")


# --- figures ---------------------------------------------------------------------------------------------------------


def of_rank(step: float, **more: float) -> dict[str, float]:
    phases = dict.fromkeys(("offload", "allocation", "capture", "rest"), 0.0)
    rank = {"shift": 0.5, "generation": 2.0, "score": 1.0, "policy": 3.0, "critic": 2.0, "step": step}
    traffic = {"bytes_inside_host": 10e6, "bytes_between_hosts": 0.0}
    return phases | rank | traffic | {"response_tokens": 800, "tokens": 1000, "processor_seconds": 4.0} | more


FOUND: dict[str, Any] = {
    "ranks": 2,
    "hosts": ["gear-a", "gear-b"],
    "device": "cpu",
    "dtype": "float32",
    "threads": 1,
    "tp_size": 1,
    "batch_size": 10,
    "parameters": 1_234_567,
    "iterations": [
        [of_rank(8.0), of_rank(10.0, bytes_inside_host=30e6, shift=1.0)],
        [of_rank(5.0, generation=4.0), of_rank(4.0, bytes_between_hosts=50e6)],
        [of_rank(20.0), of_rank(20.0, rest=0.05)],
    ],
    "memory_peak": [2**30, 3 * 2**30],
}


def test_figures_are_of_the_slowest_rank_and_of_all_tokens() -> None:
    found = summary(FOUND)
    assert found["step_seconds"] == {"median": 10.0, "min": 5.0, "max": 20.0}
    assert found["shift_seconds"] == {"median": 0.5, "min": 0.5, "max": 1.0}
    assert found["generation_tokens_per_second_per_rank"] == {"median": 200.0, "min": 100.0, "max": 200.0}
    assert found["step_tokens_per_second_per_rank"] == {"median": 50.0, "min": 25.0, "max": 100.0}
    assert found["shift_bytes_inside_host_per_rank"] == {"median": 10e6, "min": 10e6, "max": 20e6}
    assert found["shift_gb_per_second_inside_host_per_rank"] == {"median": 0.02, "min": 0.02, "max": 0.02}
    assert found["shift_bytes_between_hosts_per_rank"]["max"] == 25e6
    assert found["shift_gb_per_second_between_hosts_per_rank"]["max"] == 0.05
    assert found["processor_seconds"]["median"] == 8.0


def test_the_table() -> None:
    lines = table({**FOUND, "summary": summary(FOUND)})
    assert lines[0] == "ranks        2 on gear-a (1), gear-b (1); cpu, float32, 1 thread a rank, TP 1"
    assert lines[1] == ("iteration    10 episodes of 20 + 80 tokens, by a policy of 1,234,567 parameters; 3 of them")
    rows = {line[:40].strip(): line[40:].split() for line in lines[4:]}
    assert rows["whole step                     s"] == ["10", "5", "20"]
    assert rows["generation, each rank          tokens/s"] == ["200", "100", "200"]
    assert rows["shift between hosts, each rank MB"] == ["0.0000", "0.0000", "25"]
    assert rows["peak memory, ranks             GiB"] == ["2", "1", "3"]
    assert not any(name.startswith(("rest", "recording steps")) for name in rows)
