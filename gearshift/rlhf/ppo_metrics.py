"""What an iteration of PPO tells: means of its updates, seconds, bytes and memory, some answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gearshift.engine import (
    Episodes,
    HybridEngine,
    World,
)
from gearshift.engine.memory import peak_bytes
from gearshift.rlhf.reporting import Phases


class UpdateSums:
    """Sums of an iteration's minibatches, divided once at the end."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._norms: dict[str, list[float]] = {}
        self._losses: dict[str, list[float]] = {}

    def add(self, what: str, sums: dict[str, Tensor]) -> None:
        """What `accumulate` gave for the loss called `what`: policy, value or ptx."""
        self._losses.setdefault(what, []).append(float(sums["loss"]))
        for name, value in sums.items():
            self._sums[f"{what}/{name}"] = self._sums.get(f"{what}/{name}", 0.0) + float(value)

    def norm(self, what: str, value: float) -> None:
        """The gradient norm of a step of policy or critic."""
        self._norms.setdefault(what, []).append(value)

    def metrics(self) -> dict[str, float]:
        """Means over minibatches of losses and norms, over tokens of the rest."""
        found = {f"loss/{what}_avg": sum(losses) / len(losses) for what, losses in self._losses.items()}
        found |= {f"{what}/grad_norm": sum(norms) / len(norms) for what, norms in self._norms.items()}
        found["policy/updates"] = len(self._norms.get("policy", []))
        for what, total, name in _MEANS:
            if f"{what}/tokens" in self._sums:  # not of a model that was not updated
                found[name] = self._sums[f"{what}/{total}"] / max(1.0, self._sums[f"{what}/tokens"])
        return found


# Of which loss, which of its sums over tokens, and what its mean is called.
_MEANS = (
    ("policy", "approx_kl", "policy/approxkl_avg"),
    ("policy", "clipped", "policy/clipfrac_avg"),
    ("policy", "entropy", "policy/entropy_avg"),
    ("policy", "ratio", "val/ratio"),
    ("value", "clipped", "critic/clipfrac_avg"),
)


def timings(policy: HybridEngine, phases: Phases, episodes: Episodes, world: World) -> dict[str, float]:
    """Seconds per phase; the shift is told apart from the generation that it precedes, and from what it costs to
    free memory between rollouts (weights not kept, steps recorded again, optimizer state moved to the host
    and back)."""
    gears = {
        "shift": policy.shift_seconds,
        "allocation": policy.allocation_seconds,
        "capture": policy.capture_seconds,
        "offload": policy.offload_seconds,
    }
    generation = phases.seconds["generation"] - sum(gears.values())
    seconds = phases.seconds | gears | {"generation": generation}
    total = phases.total()
    tokens = int(episodes.lengths.sum() + episodes.mask.sum())
    return {f"timing/{name}": value for name, value in seconds.items()} | {
        "timing/step": total,
        "shift/bytes_inside_host": float(policy.shift_bytes - policy.shift_bytes_between_hosts),
        "shift/bytes_between_hosts": float(policy.shift_bytes_between_hosts),
        "throughput/tokens_per_second": tokens / total,
        "throughput/tokens_per_second_per_rank": tokens / total / world.size,
        "memory/peak_gib": world.max(peak_bytes(world.device)) / 2**30,
    }


def sample_rows(episodes: Episodes, count: int, decode: Callable[[Tensor], str]) -> list[dict[str, Any]]:
    """The first `count` episodes, for people to read."""
    rows = []
    for b in range(min(count, len(episodes))):
        kl = (episodes.logprobs[b] - episodes.ref_logprobs[b])[episodes.mask[b]].sum()
        rows.append(
            {
                "prompt": decode(episodes.tokens[b, : episodes.lengths[b]]),
                "response": decode(episodes.responses[b][episodes.mask[b]]),
                "score": float(episodes.scores[b]),
                "kl": float(kl),
                "finished": bool(episodes.finished[b]),
            }
        )
    return rows
