"""Settings and seconds that others have published, for `scale.py`: each with its source."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.scale_model import Shape, Work

SHAPES = {
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128_256),
    "llama-3-70b": Shape(8192, 28672, 80, 64, 8, 128_256),
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 32_000),
    "llama-2-13b": Shape(5120, 13824, 40, 40, 40, 32_000),
    "llama-2-70b": Shape(8192, 28672, 80, 64, 8, 32_000),
    "opt-350m": Shape(1024, 4096, 24, 16, 16, 50_272, gated=False, tied=True),
    "opt-13b": Shape(5120, 20480, 40, 40, 40, 50_272, gated=False, tied=True),
    "opt-30b": Shape(7168, 28672, 48, 56, 56, 50_272, gated=False, tied=True),
    "opt-66b": Shape(9216, 36864, 64, 72, 72, 50_272, gated=False, tied=True),
}


@dataclass(frozen=True)
class Setting:
    """`small`: the model in place of critic and reward model of the policy's own size; `between_gbs`: GB/s of a GPU to
    other hosts, where that is published."""

    title: str
    work: Work
    gpu: str
    small: str | None
    source: str
    between_gbs: float | None = None


SETTINGS = {
    "deepspeed-chat": Setting(
        "DeepSpeed-Chat", Work(1024, 256, 256, 1), "a100-80g", "opt-350m",
        "DeepSpeed repository, blogs/deepspeed-chat/README.md, footnote 1: 1,024 query-answer pairs of 256 + 256 "
        "tokens a step at most, 131.9k queries in all, a reward model of 350M; A100-80G",
    ),
    "hybridflow": Setting(
        "HybridFlow (verl)", Work(1024, 1024, 1024, 8), "a100-80g", None,
        "HybridFlow, arXiv 2409.19256, section 8.1: 1,024 prompts, 1,024 + 1,024 tokens, all answers of that length, "
        "one epoch of 8 updates, four models of one size, optimizer on the GPU; 16 hosts of 8 A100-80G, 200 Gb/s "
        "between hosts (taken to be a host's: 25 GB/s for its 8 GPUs)",
        between_gbs=25 / 8,
    ),
    "openrlhf": Setting(
        "OpenRLHF", Work(1024, 1024, 1024, 8), "a800-80g", None,
        "OpenRLHF repository, README.md, Performance, and its report, arXiv 2405.11143, tables 2 to 6: 1,024 prompts, "
        "one epoch, batches of 128, A800. Neither lengths nor network are given there: 1,024 + 1,024 tokens are those "
        "of the README's example, the network is taken to have a card of 25 GB/s for each GPU",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """Seconds of an iteration of a system, in a setting; `parts`: of it, where they are published."""

    system: str
    setting: str
    model: str
    gpus: int
    seconds: float
    parts: dict[str, float] | None = None


ITERATIONS = 131_900 / 1024  # of DeepSpeed-Chat's epoch


def _chat(model: str, gpus: int, hours: float) -> Published:
    """From the hours of tables 1 and 2."""
    return Published("DeepSpeed-Chat", "deepspeed-chat", model, gpus, hours * 3600 / ITERATIONS)


def _parts(system: str, model: str, gpus: int, *seconds: float) -> Published:
    """Of tables 5 (OpenRLHF) and 6 (DeepSpeed-Chat as OpenRLHF's authors tuned it)."""
    names = ("generation", "shift", "scoring", "training")
    return Published(system, "openrlhf", model, gpus, sum(seconds), dict(zip(names, seconds, strict=True)))


PUBLISHED = [
    _chat("opt-13b", 8, 9),
    _chat("opt-30b", 8, 18),
    _chat("opt-66b", 8, 2.1 * 24),
    _chat("opt-13b", 64, 1.25),
    _chat("opt-30b", 64, 4),
    _chat("opt-66b", 64, 7.5),
    _parts("OpenRLHF", "llama-2-7b", 16, 262.96, 4.32, 32.7, 171.13),
    _parts("OpenRLHF", "llama-2-13b", 32, 372.14, 10.03, 29.58, 197.18),
    _parts("OpenRLHF", "llama-2-70b", 32, 2252.79, 111.65, 323.38, 1800.71),
    _parts("DeepSpeed-Chat, tuned", "llama-2-7b", 16, 590.157, 65.573, 73.68, 125.68),
    _parts("DeepSpeed-Chat, tuned", "llama-2-13b", 32, 1146.614, 156.356, 87.28, 138.68),
    _parts("DeepSpeed-Chat, tuned", "llama-2-70b", 32, 3472.68, 1157.56, 2013.44, 3763.32),
]
LEFT_OUT = [
    "HybridFlow's throughputs are in a figure alone (9), and are not taken from it: its text says 3.67 times "
    "DeepSpeed-Chat and 3.25 times OpenRLHF 0.2.5, averaged over its sizes and numbers of GPUs",
    "OpenRLHF's 34B: the shape of that model is not published",
    "OpenRLHF calls its figures outdated and has none that are newer",
]
