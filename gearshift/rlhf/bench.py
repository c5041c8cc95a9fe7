"""`gearshift bench`: iterations of PPO as they are, and what each took on each rank."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gearshift.engine import Episodes, World, init_distributed, watchdog
from gearshift.engine.distributed import now
from gearshift.engine.memory import peak_bytes
from gearshift.rlhf.agreement import of_every_rank
from gearshift.rlhf.bench_inputs import load_inputs
from gearshift.rlhf.logprob_gap import LogprobGap
from gearshift.rlhf.ppo import Ppo
from gearshift.rlhf.ppo_metrics import UpdateSums
from gearshift.rlhf.ppo_settings import StopSettings
from gearshift.rlhf.reporting import Report
from gearshift.rlhf.settings import BenchConfig

# Phases in the order of an iteration, as they are called in figures: those of `timing/`, the update in two.
PHASES = ("offload", "allocation", "shift", "capture", "generation", "score", "policy", "critic", "rest")


class TimedPpo(Ppo):
    """PPO that tells the seconds of policy and critic updates apart."""

    def iteration(self, number: int) -> dict[str, float]:
        """As in `Ppo`, with `timing/policy` and `timing/critic`."""
        self.update_seconds = {"policy": 0.0, "critic": 0.0}
        metrics = super().iteration(number)
        return metrics | {f"timing/{name}": seconds for name, seconds in self.update_seconds.items()}

    def update_policy(self, minibatch: Episodes, sums: UpdateSums, gap: LogprobGap | None = None) -> float:
        start = now(self.world.device)
        found = super().update_policy(minibatch, sums, gap)
        self.update_seconds["policy"] += now(self.world.device) - start
        return found

    def update_critic(self, minibatch: Episodes, sums: UpdateSums) -> None:
        start = now(self.world.device)
        super().update_critic(minibatch, sums)
        self.update_seconds["critic"] += now(self.world.device) - start


def bench(config: BenchConfig, report: Report) -> dict[str, Any]:
    """Runs the iterations of a config `as_measured`; returns `figures`, the same on every rank. Collective."""
    world = init_distributed()
    before = peak_bytes(world.device)
    models, data = load_inputs(config, world, report)
    run = TimedPpo(config, world, models, data, report)
    report.start([f"policy       {run.policy.parameters_total:,} parameters"], config.ppo.iterations)
    iterations = []
    with watchdog.watching(world, config.run.hang_seconds):
        for number in range(1, config.ppo.iterations + 1):
            busy = time.process_time()
            found = of_rank(run, run.iteration(number))
            iterations.append(of_every_rank(found | {"processor_seconds": time.process_time() - busy}))
            report.say(f"{_called(number, config)}: {max(rank['step'] for rank in iterations[-1]):.3g} s")
    return figures(run, iterations[config.bench.warmup :], before)


def as_measured(config: BenchConfig) -> BenchConfig:
    """Iterations that are all alike, as many as are wanted; nothing is written but what a failure leaves."""
    bench, ppo = config.bench, config.ppo
    alike: dict[str, Any] = {"critic_iterations": 0, "stop": StopSettings(), "samples_every": 0}
    alike["episodes"] = (bench.warmup + bench.iterations) * ppo.batch_size
    folder = Path(tempfile.gettempdir()) / f"gearshift-bench-{os.environ.get('MASTER_PORT', '')}"
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"folder": str(folder)}),
            "ppo": ppo.model_copy(update=alike),
            "data": config.data.model_copy(update={"validation": []}),
            "ptx": config.ptx.model_copy(update={"validation": []}),
        }
    )


def of_rank(run: Ppo, metrics: dict[str, float]) -> dict[str, float]:
    """One rank's part of an iteration: seconds of `PHASES` and of the whole `step`, bytes received, and the tokens that
    all ranks together generated (responses) and went through (prompts and responses)."""
    seconds = {name: metrics[f"timing/{name}"] for name in PHASES if name != "rest"}
    step = metrics["timing/step"]
    return seconds | {
        "rest": step - sum(seconds.values()),
        "step": step,
        "bytes_inside_host": metrics["shift/bytes_inside_host"],
        "bytes_between_hosts": metrics["shift/bytes_between_hosts"],
        "response_tokens": metrics["rollout/length"] * run.config.ppo.batch_size,
        "tokens": metrics["throughput/tokens_per_second"] * step,
    }


def figures(run: Ppo, iterations: list[list[dict[str, float]]], before: int) -> dict[str, Any]:
    """All that was found: where, of what, `iterations` of `of_rank`s of every rank, and each rank's memory. Collective.

    `before`: bytes that this rank held at most before any model was loaded.
    """
    world, config = run.world, run.config
    own = {"host": socket.gethostname(), "before": before, "peak": peak_bytes(world.device)}
    ranks = of_every_rank(own)
    return {
        "ranks": world.size,
        "hosts": [rank["host"] for rank in ranks],
        "device": _device_name(world),
        "threads": torch.get_num_threads(),
        "dtype": str(run.policy.dtype).removeprefix("torch."),
        "parameters": run.policy.parameters_total,
        "tp_size": config.rollout.tp_size,
        "batch_size": config.ppo.batch_size,
        "iterations": iterations,
        "memory_before_models": [rank["before"] for rank in ranks],
        "memory_peak": [rank["peak"] for rank in ranks],
        "config": config.model_dump(mode="json"),
    }


def _device_name(world: World) -> str:
    return "cpu" if world.device.type == "cpu" else str(torch.cuda.get_device_name(world.device))


def _called(number: int, config: BenchConfig) -> str:
    warmup = config.bench.warmup
    if number <= warmup:
        return f"warm-up {number} of {warmup}"
    return f"iteration {number - warmup} of {config.bench.iterations}"
