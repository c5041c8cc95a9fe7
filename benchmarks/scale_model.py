"""The arithmetic of `scale.py`: seconds of one PPO iteration, from shapes and stated rates. Nothing runs.

Letters: N GPUs, t of a tensor-parallel group, T = prompt + response tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gearshift.engine.work import decode_flops, forward_flops, optimizer_bytes

BF16, FP32 = 2, 4
# Bytes of a parameter of a model that trains: bf16 weight; fp32 gradient, weight and two moments; the policy's average.
TRAINED, AVERAGE, FROZEN = BF16 + 4 * FP32, FP32, BF16
MOVABLE = 3 * FP32 + AVERAGE  # of the policy's: what may lie in host memory during rollouts
STEP_BYTES = optimizer_bytes(BF16, average=True)  # that an optimizer step reads and writes for a parameter


@dataclass(frozen=True)
class Rates:
    """Of one GPU; GB are 10^9 bytes. Shares are of the peak. `latency`: microseconds that a collective takes at least
    for each doubling of its ranks; `overlap`: part of the shorter of computing and communicating that the longer hides.

    `layer`: microseconds of Python for one layer's pass under ZeRO-3, which runs ahead of the GPU while that is busier;
    `step`: of a decoding step beside its products. `room`: GB that are left to what is not counted (gathered weights,
    buckets, CUDA). `micro_rows`: the most rows of a micro-batch.
    """

    tflops: float
    memory_gbs: float
    memory_gb: float
    within_gbs: float
    between_gbs: float
    host_gbs: float = 25.0
    per_host: int = 8
    forward_share: float = 0.5
    training_share: float = 0.45
    memory_share: float = 0.6
    link_share: float = 0.7
    latency: float = 10.0
    overlap: float = 0.7
    layer: float = 500.0
    step: float = 300.0
    room: float = 8.0
    micro_rows: int = 8

    @property
    def bandwidth(self) -> float:
        """Bytes a second from memory."""
        return self.memory_gbs * 1e9 * self.memory_share

    def computing(self, flops: float, share: float) -> float:
        return flops / (self.tflops * 1e12 * share)

    def joined(self, computing: float, communicating: float) -> float:
        """Both, as far as one hides the other."""
        short, long = sorted((computing, communicating))
        return long + (1 - self.overlap) * short

    def collective(self, size: float, ranks: int, messages: int = 1) -> float:
        """An all-gather to `size` bytes on every rank, or a reduce-scatter of as many, in so many messages. What comes
        from other hosts comes in once, through all network cards of a host."""
        if ranks == 1:
            return 0.0
        hosts = max(1, ranks // self.per_host)
        inside = size * (ranks - 1) / ranks / (self.within_gbs * 1e9)
        outside = size * (1 - 1 / hosts) / (self.per_host * self.between_gbs * 1e9)
        return max(inside, outside) / self.link_share + messages * self.latency * 1e-6 * math.ceil(math.log2(ranks))

    def summed(self, size: float, ranks: int) -> float:
        """An all-reduce of `size` bytes inside a host."""
        if ranks == 1:
            return 0.0
        moved = 2 * size * (ranks - 1) / ranks
        return moved / (self.within_gbs * 1e9 * self.link_share) + self.latency * 1e-6 * math.log2(ranks)


@dataclass(frozen=True)
class Shape:
    """A decoder. `gated`: three matrices in its MLP in place of two; `tied`: one embedding for both ends."""

    hidden: int
    wide: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    gated: bool = True
    tied: bool = False

    @property
    def kv_width(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    @property
    def body(self) -> int:
        """Weights of all layers."""
        attention = 2 * self.hidden * (self.hidden + self.kv_width)
        return self.layers * (attention + (3 if self.gated else 2) * self.hidden * self.wide)

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def total(self) -> int:
        return self.body + self.head * (1 if self.tied else 2)

    def forward_flops(self, tokens: int, targets: int = 0) -> float:
        """Of one row; log-probs are asked for at so many `targets`."""
        return forward_flops(self.body, self.layers * self.hidden, tokens, self.head, targets)

    def decode_flops(self, positions: float) -> float:
        """Of one token after so many."""
        return decode_flops(self.body, self.layers * self.hidden, self.head, positions)

    def cache_bytes(self, tp_size: int) -> int:
        """Keys and values of a position on one rank; heads are repeated where there are fewer than ranks."""
        return 2 * BF16 * self.layers * self.hidden // self.heads * max(1, self.kv_heads // tp_size)


@dataclass(frozen=True)
class Work:
    """An iteration: `episodes` of `prompt` + `response` tokens, in `minibatches` (of a row a rank at least)."""

    episodes: int
    prompt: int
    response: int
    minibatches: int

    @property
    def length(self) -> int:
        return self.prompt + self.response

    def updates(self, ranks: int) -> int:
        return max(1, min(self.minibatches, self.episodes // ranks))


@dataclass(frozen=True)
class Models:
    """The reference is of the policy's shape."""

    policy: Shape
    critic: Shape
    reward: Shape

    def held(self, ranks: int) -> float:
        """Bytes on a rank outside of rollouts, without activations."""
        policy, critic = self.policy.total * (TRAINED + AVERAGE + FROZEN), self.critic.total * TRAINED
        return (policy + critic + self.reward.total * FROZEN) / ranks


@dataclass(frozen=True)
class Term:
    """`part` of an iteration ("generation"), what it does, and what most of its time goes to."""

    part: str
    name: str
    seconds: float
    limit: str


@dataclass(frozen=True)
class Prediction:
    """`slots`: rows that a tensor-parallel group decodes at once; `micro_rows`: of a training micro-batch; `aside`: the
    policy's optimizer state is in host memory during rollouts."""

    ranks: int
    tp_size: int
    slots: int
    micro_rows: int
    updates: int
    aside: bool
    terms: tuple[Term, ...]

    @property
    def seconds(self) -> float:
        return sum(term.seconds for term in self.terms)

    def part(self, name: str) -> float:
        return sum(term.seconds for term in self.terms if term.part == name)


def longest(parts: dict[str, float]) -> str:
    return max(parts, key=lambda name: parts[name])


def slots_of(models: Models, work: Work, rates: Rates, ranks: int, tp_size: int, aside: bool) -> int:
    """Rows of which keys and values fit beside all else on each rank of a group, at most those that it is given."""
    policy = models.policy
    free = (rates.memory_gb - rates.room) * 1e9 - models.held(ranks) - BF16 * policy.total / tp_size
    if aside:
        free += MOVABLE * policy.total / ranks
    fitting = int(free // (policy.cache_bytes(tp_size) * work.length))
    return max(0, min(fitting, work.episodes * tp_size // ranks))


def micro_rows_of(models: Models, work: Work, rates: Rates, ranks: int) -> int:
    """Rows of a training micro-batch that fit when layers keep their inputs alone; 0: not one does."""
    free = (rates.memory_gb - rates.room) * 1e9 - models.held(ranks)
    rows = []
    for shape in (models.policy, models.critic):
        layer = work.length * (12 * shape.wide + 16 * shape.hidden)  # one layer's own activations
        rows.append(int(free // (BF16 * work.length * shape.hidden * shape.layers + layer)))
    return max(0, min(*rows, rates.micro_rows, work.episodes // ranks // work.updates(ranks)))


def generation(shape: Shape, work: Work, rates: Rates, ranks: int, tp_size: int, slots: int) -> list[Term]:
    """All answers are as long as they may be; slots are refilled in whole waves."""
    rows = work.episodes * tp_size // ranks
    waves = math.ceil(rows / slots)
    weights = BF16 * (shape.body + shape.head) / tp_size
    tokens = rows * work.prompt
    sums = 2 * shape.layers * waves * rates.summed(BF16 * shape.hidden * tokens / waves, tp_size)
    prefill = {
        "flops": rates.computing(rows * shape.forward_flops(work.prompt, 1) / tp_size, rates.forward_share),
        "memory bandwidth": waves * weights / rates.bandwidth,
    }
    positions = work.prompt + work.response / 2
    step = {
        "memory bandwidth": (weights + slots * positions * shape.cache_bytes(tp_size)) / rates.bandwidth,
        "flops": rates.computing(slots * shape.decode_flops(positions) / tp_size, rates.forward_share),
    }
    reduced = 2 * shape.layers * rates.summed(BF16 * shape.hidden * slots, tp_size)
    steps = waves * work.response
    each = {longest(step): max(step.values()), "all-reduces": reduced, "host": rates.step * 1e-6}
    return [
        Term("generation", "prefill", max(prefill.values()) + sums, longest({**prefill, "all-reduces": sums})),
        Term("generation", "decode", steps * sum(each.values()), longest(each)),
    ]


def forward(name: str, shape: Shape, work: Work, rates: Rates, ranks: int, targets: int) -> Term:
    """Every episode through one model under ZeRO-3, whose weights are gathered once for each micro-batch."""
    rows = work.episodes / ranks
    micro_batches = math.ceil(rows / rates.micro_rows)
    parts = {
        "flops": rates.computing(rows * shape.forward_flops(work.length, targets), rates.forward_share),
        "host": micro_batches * shape.layers * rates.layer * 1e-6,
        "links": micro_batches * rates.collective(BF16 * shape.total, ranks, shape.layers),
    }
    return Term("scoring", name, rates.joined(max(parts["flops"], parts["host"]), parts["links"]), longest(parts))


def training(name: str, shape: Shape, work: Work, rates: Rates, ranks: int, micro_rows: int, targets: int) -> Term:
    """One epoch: forward, forward again, backward; weights gathered twice and fp32 gradients reduced for each
    micro-batch; and the optimizer's steps."""
    rows, updates = work.episodes / ranks, work.updates(ranks)
    micro_batches = updates * math.ceil(rows / updates / micro_rows)
    gathers = 2 * rates.collective(BF16 * shape.total, ranks, shape.layers)
    parts = {
        "flops": rates.computing(4 * rows * shape.forward_flops(work.length, targets), rates.training_share),
        "host": micro_batches * 3 * shape.layers * rates.layer * 1e-6,
        "links": micro_batches * (gathers + rates.collective(FP32 * shape.total, ranks, shape.layers)),
    }
    steps = updates * STEP_BYTES * shape.total / ranks / rates.bandwidth
    seconds = rates.joined(max(parts["flops"], parts["host"]), parts["links"]) + steps
    return Term("training", name, seconds, longest({**parts, "memory bandwidth": steps}))


def predicted(
    models: Models, work: Work, rates: Rates, ranks: int, tp_size: int, shift: Callable[[int, int], float]
) -> Prediction | None:
    """None: it does not fit. `shift(ranks, tp_size)`: seconds of one shift at full link speed."""
    policy, critic = models.policy, models.critic
    micro_rows = micro_rows_of(models, work, rates, ranks)
    aside = slots_of(models, work, rates, ranks, tp_size, False) < work.episodes * tp_size // ranks
    slots = slots_of(models, work, rates, ranks, tp_size, aside)
    if not micro_rows or not slots:
        return None
    moved = 2 * MOVABLE * policy.total / ranks / (rates.host_gbs * 1e9 * rates.link_share)
    terms = [
        *generation(policy, work, rates, ranks, tp_size, slots),
        Term("shift", "weights", shift(ranks, tp_size) / rates.link_share, "links"),
        Term("shift", "optimizer to the host and back", moved if aside else 0.0, "host memory"),
        forward("reference", policy, work, rates, ranks, work.response),
        forward("policy", policy, work, rates, ranks, work.response),
        forward("reward model", models.reward, work, rates, ranks, 0),
        forward("critic", critic, work, rates, ranks, 0),
        training("policy", policy, work, rates, ranks, micro_rows, work.response),
        training("critic", critic, work, rates, ranks, micro_rows, 0),
    ]
    return Prediction(ranks, tp_size, slots, micro_rows, work.updates(ranks), aside, tuple(terms))


def best(models: Models, work: Work, rates: Rates, ranks: int, shift: Callable[[int, int], float]) -> Prediction | None:
    """With the tensor-parallel size, within a host, that takes least time."""
    sizes = [t for t in (1, 2, 4, 8) if t <= min(ranks, rates.per_host) and models.policy.heads % t == 0]
    found = [predicted(models, work, rates, ranks, t, shift) for t in sizes]
    return min((one for one in found if one is not None), key=lambda one: one.seconds, default=None)
