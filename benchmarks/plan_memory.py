"""What `gearshift plan` predicts of memory against what PPO runs take, phase by phase.

    deepspeed --num_accelerators 2 benchmarks/plan_memory.py                    (on GPUs: --num_gpus 2)
    deepspeed --num_accelerators 2 benchmarks/plan_memory.py --sizes CHECKED --markdown docs/planner-memory.md

Three iterations of PPO-ptx for each size, with random models; of every phase, the peak bytes of live tensors on the
rank that has the most (`LiveBytes` says what counts). CALIBRATED are the sizes at which the planner was corrected until
it fitted; CHECKED were not looked at before.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

# The repository in place of this folder, whose `kernels` would hide Hugging Face's package of that name.
if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch.distributed as dist

from benchmarks.plan_runs import CALIBRATED, CHECKED, Quiet, Size, make_run
from gearshift.engine import World, init_distributed
from gearshift.engine.loading import config_of
from gearshift.engine.memory import Scratch
from gearshift.engine.neighbours import neighbours
from gearshift.launch.planner.live import LiveBytes
from gearshift.launch.planner.ppo import PpoPlan, Shapes
from gearshift.rlhf.ppo import Ppo
from gearshift.rlhf.ppo_data import PpoData
from gearshift.rlhf.ppo_models import load_models
from gearshift.rlhf.settings import PpoConfig
from gearshift.rlhf.setup import dtype_of

ITERATIONS = 3  # in the first, what is recorded of a pass may be that of a check


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    parser.add_argument("--sizes", nargs="*", default=["CALIBRATED", "CHECKED"], help="groups, or names of sizes")
    parser.add_argument("--detail", action="store_true", help="the parts of each prediction as well")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--markdown", type=Path, help="and the table to this file")
    options = parser.parse_args()
    world = init_distributed()
    groups = {"CALIBRATED": CALIBRATED, "CHECKED": CHECKED}
    every = {**CALIBRATED, **CHECKED}
    found = []
    for word in options.sizes:
        for name, size in groups.get(word, {word: every.get(word)}).items():
            if size is None:
                parser.error(f"no size {name}: use some of {', '.join([*groups, *every])}")
            group = "CHECKED" if name in CHECKED else "CALIBRATED"
            found.append({"size": name, "group": group, **of_size(size, world)})
            if world.is_main:
                tell(found[-1], options.detail)
    if world.is_main and options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if world.is_main and options.markdown:
        options.markdown.write_text("\n".join(markdown(found)) + "\n", encoding="utf-8")


def of_size(size: Size, world: World) -> dict[str, Any]:
    """Predicted and measured bytes of each phase."""
    shared: list[Any] = [tempfile.mkdtemp(prefix="gearshift-plan-") if world.is_main else None]
    dist.broadcast_object_list(shared, src=0)
    folder = Path(shared[0])
    try:
        with world.main_first():
            if world.is_main:
                make_run(size, folder)
        config = size.config(folder)
        measured = measure(config, world)
        predicted = predict(config, world)
    finally:
        dist.barrier()
        if world.is_main:
            shutil.rmtree(folder)
    parts = {phase.name: phase.parts for phase in predicted.phases}
    return {"parameters": predicted.models["policy"].total, "predicted": parts, "measured": measured}


def predict(config: PpoConfig, world: World) -> PpoPlan:
    """The plan of the run that `measure` makes: steps of decoding are not recorded."""
    policy, reward = config_of(config.policy.init), config_of(config.reward.init)
    shapes = Shapes(policy, reward, reward, policy)
    dtype = dtype_of(config.run, world)
    return PpoPlan(config, shapes, world.size, world.local_size, dtype, graphs=False, device=world.device)


def measure(config: PpoConfig, world: World) -> dict[str, int]:
    """Peaks of a run's phases, in the largest of its iterations and on the rank that has most."""
    live = LiveBytes()
    with live, mock.patch.object(Scratch, "by_pages", False):
        data = PpoData.load(config, world, Quiet())
        run = Ppo(config, world, load_models(config, world, data), data, Quiet())
        # There is none of it where ranks compute on GPUs.
        live.ignore(
            *(shared.parts for shared in (neighbours(world), run.policy.group.neighbours) if shared is not None)
        )
        peaks: dict[str, int] = {}
        watch(run, live, peaks)
        for number in range(1, ITERATIONS + 1):
            run.iteration(number)
    return {name: int(world.max(peak)) for name, peak in sorted(peaks.items())}


def watch(run: Ppo, live: LiveBytes, peaks: dict[str, int]) -> None:
    """Notes the peak of each call that makes a phase."""

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            live.reset_peak()
            try:
                return call(*args, **kwargs)
            finally:
                peaks[name] = max(peaks.get(name, 0), live.peak)

        return wrapped

    def accumulate(*args: Any, weight: float | None = None, **kwargs: Any) -> Any:
        name = "train: policy" if weight is None else "train: policy, pretraining text"
        more = {} if weight is None else {"weight": weight}
        return noted(name, policy_accumulate)(*args, **kwargs, **more)

    policy, critic = run.policy, run.critic
    policy_accumulate, rollout = policy.accumulate, policy.rollout

    @contextmanager
    def watched_rollout() -> Iterator[Any]:
        live.reset_peak()
        with rollout() as generator:
            yield generator
        peaks["rollout"] = max(peaks.get("rollout", 0), live.peak)

    for owner, method, name in (
        (run.reward_model, "score", "score: reward model"),
        (run.reference, "logprobs", "score: reference"),
        (policy, "logprobs", "score: policy"),
        (critic, "values", "values: critic"),
        (policy, "step", "step: policy"),
        (critic, "accumulate", "train: critic"),
        (critic, "step", "step: critic"),
    ):
        setattr(owner, method, noted(name, getattr(owner, method)))
    policy.accumulate, policy.rollout = accumulate, watched_rollout  # type: ignore[method-assign,assignment]


def tell(found: dict[str, Any], detail: bool) -> None:
    print(f"\n{found['size']} ({found['group']}): a policy of {found['parameters'] / 1e6:.1f} M parameters")
    print(f"  {'phase':<34}{'predicted':>11}{'measured':>11}{'ratio':>8}   (MB)")
    for name, parts in found["predicted"].items():
        predicted, measured = sum(parts.values()), found["measured"][name]
        print(f"  {name:<34}{predicted / 1e6:11.2f}{measured / 1e6:11.2f}{predicted / measured:8.3f}")
        if detail:
            print("      " + ", ".join(f"{part} {value / 1e6:.2f}" for part, value in parts.items() if value))
    predicted, measured = peaks(found)
    print(f"  {'peak of the run':<34}{predicted / 1e6:11.2f}{measured / 1e6:11.2f}{predicted / measured:8.3f}")


def peaks(found: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the largest phase, predicted and measured."""
    return max(sum(parts.values()) for parts in found["predicted"].values()), max(found["measured"].values())


def markdown(found: list[dict[str, Any]]) -> list[str]:
    """The table of docs/planner.md."""
    names = list(found[0]["predicted"])
    lines = ["| phase | " + " | ".join(f"{one['size']} ({one['group'].lower()})" for one in found) + " |"]
    lines.append("|---" * (1 + len(found)) + "|")
    for name in [*names, "peak of the run"]:
        cells = []
        for one in found:
            predicted, measured = peaks(one)
            if name in one["predicted"]:
                predicted, measured = sum(one["predicted"][name].values()), one["measured"][name]
            cells.append(f"{predicted / 1e6:.1f} / {measured / 1e6:.1f} ({predicted / measured - 1:+.1%})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
