"""A plan for the screen, and for machines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import yaml

from gearshift.launch.arithmetic import batch_arithmetic
from gearshift.launch.planner.fitting import Change, asked_rows, changes, largest_micro_batch, largest_slots
from gearshift.launch.planner.machines import GB, RESERVED, Gpu
from gearshift.launch.planner.ppo import PpoPlan
from gearshift.launch.planner.rollouts import shift_seconds

# Of `Phase.parts`, in the order of the table, and what stands above it.
COLUMNS = {
    "weights": "weights", "gradients": "grads", "optimizer": "optim.", "buckets": "buckets",
    "rollout weights": "rollout w.", "KV cache": "KV", "gathered": "gathered", "activations": "activ.",
    "episodes": "episodes",
}  # fmt: skip


@dataclass(frozen=True)
class Machines:
    """`gpus` of a kind, `per_host` on each host; `name`: as it was asked for."""

    name: str
    gpus: int
    per_host: int
    gpu: Gpu

    @property
    def usable(self) -> float:
        """Bytes of a GPU that tensors can have."""
        return (self.gpu.memory - RESERVED) * GB


@dataclass(frozen=True)
class Findings:
    """What a plan comes to on some machines."""

    plan: PpoPlan
    machines: Machines
    fits: bool
    micro_batch: int
    slots: int
    changes: list[Change]

    @classmethod
    def of(cls, plan: PpoPlan, machines: Machines) -> Findings:
        memory = machines.usable
        fits = plan.largest.total <= memory
        return cls(
            plan, machines, fits, largest_micro_batch(plan, memory), largest_slots(plan, memory),
            [] if fits else changes(plan, memory),
        )  # fmt: skip

    @property
    def shift_seconds(self) -> float:
        gpu = self.machines.gpu
        return shift_seconds(self.plan.traffic, self.plan.dtype.itemsize, gpu.within * GB, gpu.between * GB)

    @property
    def tokens(self) -> tuple[int, int]:
        """The most tokens of an iteration, and those of them that the policy writes."""
        batch = self.plan.config.ppo.batch_size
        return batch * (self.plan.prompt + self.plan.response), batch * self.plan.response


def as_json(found: Findings) -> dict[str, Any]:
    """Bytes and seconds."""
    plan, size = found.plan, found.plan.dtype.itemsize
    traffic = plan.traffic
    return {
        "fits": found.fits,
        "machines": asdict(found.machines),
        "usable_bytes": int(found.machines.usable),
        "models": {name: {"parameters": m.total, "trained": m.trained} for name, m in plan.models.items()},
        "held": {name: asdict(held) for name, held in plan.holdings.items()},
        "phases": [asdict(phase) | {"total": phase.total} for phase in plan.phases],
        "host_bytes": plan.host_bytes,
        "shift": {
            "slices_bytes": plan.rollout_weights,
            "buffers_bytes": plan.buffers,
            "received_bytes": int(traffic.received.max()) * size,
            "received_between_hosts_bytes": int(traffic.received_between_hosts.max()) * size,
            "seconds": found.shift_seconds,
        },
        "tokens_per_iteration": dict(zip(("all", "written"), found.tokens, strict=True)),
        "batches": batch_arithmetic(plan.config, plan.ranks),
        "largest": {"ppo.micro_batch_size": found.micro_batch, "rollout.slots": found.slots},
        "changes": [asdict(change) for change in found.changes],
    }


def as_text(found: Findings) -> list[str]:
    plan, machines, peak = found.plan, found.machines, found.plan.largest
    hosts = -(-machines.gpus // machines.per_host)
    where = f"{machines.gpus} x {machines.name}, {hosts} {'host' if hosts == 1 else 'hosts'}"
    dtype = {2: "bf16", 4: "fp32"}[plan.dtype.itemsize]
    verdict = "fits" if found.fits else "DOES NOT FIT"
    lines = [
        f"{verdict}: {_gb(peak.total)} of {_gb(machines.usable)} GB ({peak.name}) on {where}, {dtype}; "
        f"{RESERVED:g} GB of a GPU are left to CUDA, NCCL and holes between tensors",
        "",
        "models       " + ", ".join(
            f"{name} {_parameters(m.total)}{' (trained)' if m.trained else ''}" for name, m in plan.models.items()
        ),
        *batch_arithmetic(plan.config, plan.ranks),
        "tokens       up to {:,} per iteration, of which the policy writes {:,}".format(*found.tokens),
        _shift(found),
        "",
        *_table(plan),
    ]  # fmt: skip
    if plan.host_bytes:
        each, ranks = plan.host_bytes, min(machines.per_host, machines.gpus)
        lines.append(f"and {_gb(each)} GB of host memory for each rank, {_gb(each * ranks)} GB on a host")
    return [*lines, "", *_largest(found), *_changes(found)]


def _shift(found: Findings) -> str:
    traffic, size, gpu = found.plan.traffic, found.plan.dtype.itemsize, found.machines.gpu
    outside = int(traffic.received_between_hosts.max()) * size
    inside = int((traffic.received - traffic.received_between_hosts).max()) * size
    return (
        f"shift        {_gb(inside)} GB to a rank from its host and {_gb(outside)} from others, at least "
        f"{found.shift_seconds:.2f} s at {gpu.within:g} and {gpu.between:g} GB/s"
    )


def _table(plan: PpoPlan) -> list[str]:
    shown = [part for part in COLUMNS if any(phase.parts[part] >= 5e6 for phase in plan.phases)]
    widths = {part: max(7, len(COLUMNS[part]) + 1) for part in shown}
    names = max(len(phase.name) for phase in plan.phases) + 1
    head = f"{'GB on the rank that has most':<{names}}" + "".join(f"{COLUMNS[p]:>{widths[p]}}" for p in shown)
    lines = [head + f"{'total':>8}"]
    for phase in plan.phases:
        cells = "".join(f"{_gb(phase.parts[part]):>{widths[part]}}" for part in shown)
        mark = "  <- peak" if phase is plan.largest else ""
        lines.append(f"{phase.name:<{names}}{cells}{_gb(phase.total):>8}{mark}")
    return lines


def _largest(found: Findings) -> list[str]:
    asked, rows = asked_rows(found.plan), found.plan.rollouts
    lines = []
    for field, most, now in (
        ("ppo.micro_batch_size", found.micro_batch, asked),
        ("rollout.slots", found.slots, rows.slots),
    ):
        told = f"at most {most}" if most else "not even 1 fits as things are"
        lines.append(f"{field:<22}{told} (here {now})")
    return lines


def _changes(found: Findings) -> list[str]:
    if found.fits:
        return []
    if not found.changes:
        return ["", "Nothing that is known here would make it fit: use more GPUs, or ones with more memory."]
    lines = ["", "To make it fit, one after the other:"]
    for change in found.changes:
        value = yaml.safe_dump(change.value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
        lines.append(f"  {change.field}: {value}   -> {_gb(change.peak)} GB")
    if found.changes[-1].peak > found.machines.usable:
        lines.append("  and that is not enough: use more GPUs, shorter sequences, or policy.lora")
    return lines


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count:,}"


def _gb(size: float) -> str:
    return f"{size / GB:.2f}" if size < 99.995 * GB else f"{size / GB:.1f}"
