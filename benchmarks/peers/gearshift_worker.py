"""Gearshift's iterations: `Ppo.iteration` of a run as its config makes it.

python -m benchmarks.peers.gearshift_worker FOLDER     (one process per rank; `ppo_step.py` starts them)
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.setting import Setting
from benchmarks.peers.worker import Channel, Clock, turns

if TYPE_CHECKING:
    from gearshift.engine import World
    from gearshift.rlhf.ppo import Ppo


def main() -> None:
    channel = Channel()
    from gearshift.engine import init_distributed

    iterations = Iterations(Path(sys.argv[1]), init_distributed())
    for clock in turns(channel):
        iterations.next(clock)


class Iterations:
    """One after the other."""

    def __init__(self, folder: Path, world: World):
        self.run, self.number = run_of(folder, world), 0

    def next(self, clock: Clock) -> dict[str, float]:
        """Does one, tells the clock what its phases took, and returns its metrics."""
        self.number += 1
        metrics = self.run.iteration(self.number)
        generation = sum(metrics[f"timing/{part}"] for part in GENERATION)
        score = metrics["timing/score"]
        # What lies between the phases (metrics, the next prompts) counts to the last.
        clock.seconds = {"generation": generation, "score": score, "train": clock.total() - generation - score}
        return metrics


GENERATION = ("generation", "shift", "allocation", "capture", "offload")


def run_of(folder: Path, world: World) -> Ppo:
    from benchmarks.plan_runs import Quiet
    from gearshift.rlhf.ppo import Ppo
    from gearshift.rlhf.ppo_data import PpoData
    from gearshift.rlhf.ppo_models import load_models
    from gearshift.rlhf.settings import PpoConfig

    config = PpoConfig.model_validate(config_of(Setting.load(folder), folder, world.size))
    data = PpoData.load(config, world, Quiet())
    run = Ppo(config, world, load_models(config, world, data), data, Quiet())
    run.sampling = dataclasses.replace(run.sampling, eos_ids=())  # every answer has all its tokens
    return run


def config_of(setting: Setting, folder: Path, ranks: int) -> dict[str, Any]:
    """The defaults, but for sizes, one optimizer step, no ramp of the rates, and no average of the weights: the others
    keep none."""
    return {
        "run": {"folder": str(folder / "run"), "ranks": ranks, "dtype": "fp32"},
        "policy": {"init": str(folder / "policy")},
        "reward": {"init": str(folder / "reward")},
        "critic": {"learning_rate": setting.learning_rate},
        "data": {"train": str(folder / "prompts.jsonl"), "max_prompt_tokens": setting.prompt_tokens},
        "rollout": {"tp_size": ranks, "max_new_tokens": setting.new_tokens},
        "ppo": {
            "batch_size": setting.episodes, "minibatches": 1, "micro_batch_size": setting.micro_batch,
            "warmup_iterations": 0, "samples_every": 0, "ema": None, "kl": {"coef": setting.kl_coef},
        },
        "optimizer": {"learning_rate": setting.learning_rate},
        "tracking": {"trackers": []},
    }  # fmt: skip


if __name__ == "__main__":
    main()
