"""The figures of `gearshift bench` for people: medians over the iterations, beside the least and the most of them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Ranks = Sequence[Mapping[str, float]]  # one iteration, of each rank

# Figure -> what it is called. Of those that are not in ALWAYS, what takes less than SMALL of the step is left out.
SECONDS = {
    "offload": "optimizer state aside",
    "allocation": "memory for weights",
    "shift": "shift",
    "capture": "recording steps",
    "generation": "generation",
    "score": "score",
    "policy": "train: policy",
    "critic": "train: critic",
    "rest": "rest",
    "step": "whole step",
}
ALWAYS = ("shift", "generation", "score", "policy", "step")
SMALL = 0.005


def summary(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Figure -> its `median`, `min` and `max` over the iterations.

    Seconds are those of the slowest rank; tokens/s are of all ranks' tokens over those seconds, by ranks; bytes are
    means over ranks, and GB/s those over the seconds of the shift.
    """
    iterations: Sequence[Ranks] = found["iterations"]
    figures = {f"{name}_seconds": _spread(_slowest(ranks, name) for ranks in iterations) for name in SECONDS}
    for name, tokens in (("generation", "response_tokens"), ("step", "tokens")):
        rates = (ranks[0][tokens] / _slowest(ranks, name) / len(ranks) for ranks in iterations)
        figures[f"{name}_tokens_per_second_per_rank"] = _spread(rates)
    for where in ("inside_host", "between_hosts"):
        received = [sum(rank[f"bytes_{where}"] for rank in ranks) / len(ranks) for ranks in iterations]
        seconds = [_slowest(ranks, "shift") for ranks in iterations]
        figures[f"shift_bytes_{where}_per_rank"] = _spread(received)
        figures[f"shift_gb_per_second_{where}_per_rank"] = _spread(
            n / 1e9 / s if s else 0.0 for n, s in zip(received, seconds, strict=True)
        )
    figures["processor_seconds"] = _spread(sum(rank["processor_seconds"] for rank in ranks) for ranks in iterations)
    return figures


def _spread(figures: Iterable[float]) -> dict[str, float]:
    values = list(figures)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _slowest(ranks: Ranks, name: str) -> float:
    return max(rank[name] for rank in ranks)


def table(found: Mapping[str, Any]) -> list[str]:
    """Lines for the screen; `found["summary"]` is there."""
    lines = [*_head(found), "", f"{'':<40}{'median':>10}{'min':>10}{'max':>10}"]
    peaks = [peak / 2**30 for peak in found["memory_peak"]]
    memory = {"median": statistics.median(peaks), "min": min(peaks), "max": max(peaks)}
    for label, unit, spread in [*_rows(found["summary"]), ("peak memory, ranks", "GiB", memory)]:
        cells = "".join(f"{_short(spread[which]):>10}" for which in ("median", "min", "max"))
        lines.append(f"{label:<31}{unit:<9}{cells}")
    return lines


def _short(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else f"{value:.4f}"


def _head(found: Mapping[str, Any]) -> list[str]:
    hosts = Counter(found["hosts"])
    where = ", ".join(f"{host} ({count})" for host, count in hosts.items())
    iterations = found["iterations"]
    responses = statistics.fmean(ranks[0]["response_tokens"] for ranks in iterations) / found["batch_size"]
    prompts = statistics.fmean(ranks[0]["tokens"] for ranks in iterations) / found["batch_size"] - responses
    return [
        f"ranks        {found['ranks']} on {where}; {found['device']}, {found['dtype']}, "
        f"{found['threads']} thread{'s' * (found['threads'] > 1)} a rank, TP {found['tp_size']}",
        f"iteration    {found['batch_size']} episodes of {prompts:.0f} + {responses:.0f} tokens, by a policy of "
        f"{found['parameters']:,} parameters; {len(iterations)} of them",
    ]


def _rows(figures: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str, Mapping[str, float]]]:
    """(what, unit, spread) of each line."""
    least = SMALL * figures["step_seconds"]["median"]
    seconds = {name: figures[f"{name}_seconds"] for name in SECONDS}
    rows = [
        (SECONDS[name], "s", spread) for name, spread in seconds.items() if name in ALWAYS or spread["median"] > least
    ]
    for name, label in (("generation", "generation, each rank"), ("step", "whole step, each rank")):
        rows.append((label, "tokens/s", figures[f"{name}_tokens_per_second_per_rank"]))
    for where, label in (("inside_host", "inside a host"), ("between_hosts", "between hosts")):
        received = figures[f"shift_bytes_{where}_per_rank"]
        if received["max"] > 0:
            rows.append((f"shift {label}, each rank", "MB", {which: n / 1e6 for which, n in received.items()}))
            rows.append((f"shift {label}, each rank", "GB/s", figures[f"shift_gb_per_second_{where}_per_rank"]))
    return rows
