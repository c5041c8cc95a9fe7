"""Recorded steps on a processor: the bits of the step itself, and nothing recorded that looks at values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.engine import Rollouts, Sampling, World
from gearshift.engine.tape import Tape
from gearshift.kernels import native
from tests.engine.test_hybrid import _policy as policy_of
from tests.engine.test_hybrid import some_prompts
from tests.models import save_tiny
from tests.worker_group import WorkerGroup


def test_what_is_done_again() -> None:
    """Views, operations in place, several results, casts, one that has no variant with results given."""
    x, y = torch.randn(3, 4), torch.zeros(3)

    def step() -> None:
        turned = (x * 2).t()[1:].contiguous()
        best, at = turned.max(0)
        total = torch.zeros(3)
        total += best + at
        total[1] = 7.0
        y.copy_(torch.where(total > 0, total, torch.tile(best[:1], (3,))) + x.double().sum().float())

    again = Tape().record(step)
    for _ in range(3):
        x.copy_(torch.randn(3, 4))
        step()
        expected = y.clone()
        y.zero_()
        again()
        assert torch.equal(y, expected)


@pytest.mark.parametrize(
    "look",
    [
        lambda x: float(x.sum()),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.numpy(),
        lambda x: torch.unique(x.long()),
        lambda x: x.index_put_((x > 0,), torch.zeros(())),
    ],
)
def test_a_step_that_looks_at_values_is_not_recorded(look: Callable[[Tensor], Any]) -> None:
    x = torch.randn(5)
    with pytest.raises(RuntimeError, match="reads a tensor's values"):
        Tape().record(lambda: look(x + 1))


# --- in generation ---------------------------------------------------------------------------------------------------

VARIED = Sampling(24, eos_ids=tuple(range(2, 8)), seed=5)


def both_ways(world: World, folder: str, tp_size: int, slots: int | None) -> tuple[Rollouts, Rollouts, int, int, bool]:
    """Three rollouts with steps as they come and with recorded ones, an optimizer's step's worth of shift between them;
    and how many were recorded, and done again."""
    replays, found = [0], []
    for record in (False, True):
        policy = policy_of(world, folder, tp_size, slots=slots, record_steps=record)
        mine = some_prompts(24).select(slice(world.rank, None, world.size))
        for _ in range(3):
            policy.steps += 1
            with policy.rollout() as generator:
                decoder = generator._replica.decoder
                rollouts = generator.generate(mine, VARIED)
        found.append(rollouts)
    table: dict[Any, Any] = decoder._table
    proven = not decoder._unproven
    for size, call in table.items():
        table[size] = lambda call=call: (replays.__setitem__(0, replays[0] + 1), call())
    with policy.rollout() as generator:
        generator.generate(mine, VARIED)
    return found[0], found[1], len(table), replays[0], proven


@pytest.mark.skipif(native.built() is None, reason="the compiled library is not there")
@pytest.mark.parametrize(("family", "tp_size", "slots"), [("llama", 2, 4), ("llama", 1, None), ("gemma2", 2, 5)])
def test_recorded_steps_give_the_same_bits(
    two_ranks: WorkerGroup, tmp_path: Path, family: str, tp_size: int, slots: int | None
) -> None:
    """Answers of many lengths, slots that are refilled and dropped, windows and soft-caps."""
    folder = str(save_tiny(family, tmp_path / family))
    for plain, recorded, recordings, replays, proven in two_ranks.run(both_ways, folder, tp_size, slots, timeout=90):
        assert torch.equal(plain.responses, recorded.responses)
        assert torch.equal(plain.logprobs, recorded.logprobs)
        assert torch.equal(plain.mask, recorded.mask)
        assert recordings >= 1
        assert replays >= 10
        assert proven


def misled(world: World, folder: str) -> tuple[bool, Rollouts, Rollouts]:
    """A recording that gives other log-probs on one rank: found out before its results are used, on both."""
    policy = policy_of(world, folder, 2)
    mine = some_prompts(4).select(slice(world.rank, None, world.size))
    record = Tape.record

    def nothing(self: Tape, step: Callable[[], Any]) -> Callable[[], Any]:
        again = record(self, step)
        spoil = policy._replica.decoder._logprobs.add_  # type: ignore[union-attr]
        return (lambda: (again(), spoil(1.0))) if world.rank else again

    Tape.record = nothing  # type: ignore[method-assign]
    try:
        with policy.rollout() as generator:
            found = generator.generate(mine, Sampling(12, eos_ids=(), seed=1))
            gave_up = not generator._replica.decoder.records
    finally:
        Tape.record = record  # type: ignore[method-assign]
    plain = policy_of(world, folder, 2, record_steps=False)
    with plain.rollout() as generator:
        return gave_up, found, generator.generate(mine, Sampling(12, eos_ids=(), seed=1))


@pytest.mark.skipif(native.built() is None, reason="the compiled library is not there")
def test_a_recording_that_gives_something_else_is_not_used(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    for gave_up, found, expected in two_ranks.run(misled, str(save_tiny("llama", tmp_path / "llama")), timeout=60):
        assert gave_up
        assert torch.equal(found.responses, expected.responses)
        assert torch.equal(found.logprobs, expected.logprobs)
