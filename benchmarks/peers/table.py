"""What was measured of each way, as a table, as JSON and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.processes import Turn
from benchmarks.peers.worker import PHASES

# Each peer, and the way of Gearshift with as many processes.
AGAINST = {"trl": "gearshift", "trl-zero3": "gearshift-zero3", "plain-zero3": "gearshift-zero3"}
SPEED = {"trl": 1.5, "trl-zero3": 2.0, "plain-zero3": 5.0}  # times the peer's episodes per second, at least
LARGE_VOCABULARY = 50_257
MEMORY = 1.0  # of TRL's peak per process, at most
MEMORY_LARGE_VOCABULARY = 0.5

# Peers do the same step otherwise; each line holds for all sizes.
DIFFERENCES = """\
What differs in the work:
  gearshift    also holds training against rollout log-probs, in a forward that it needs anyway; whitens over the whole
               batch; old log-probs and those of the KL are the rollout's; policy and critic each have their
               own optimizer step and clip. The average of the weights is off, as the others keep none.
  trl          one optimizer step of policy and critic together, the value loss times 0.1; old log-probs from the scores
               of generation, which it keeps [episodes, tokens, vocabulary]; whitens per process; the entropy of every
               token, from the whole softmax once more; does not clip gradients without DeepSpeed. Generation and
               scoring take all rows of a process at once.
  trl-zero3    the same with policy and critic in one ZeRO-3 engine, the weights of both gathered for generation.
  plain-zero3  generates layer by layer from shards (the actor's ZeRO-3 engine); runs the actor forward again for old
               log-probs; does not whiten; no entropy; the log-softmax of whole sequences, prompts included."""


def row(turns: Sequence[Turn], episodes: int, new_tokens: int) -> dict[str, Any]:
    """Medians over the turns, and all of them."""
    phases = {phase: statistics.median(turn.seconds[phase] for turn in turns) for phase in PHASES}
    seconds = statistics.median(turn.total for turn in turns)
    return {
        "seconds": seconds,
        "phases": phases,
        "episodes_per_second": episodes / seconds,
        "generated_tokens_per_second": episodes * new_tokens / phases["generation"],
        "cpu_seconds": statistics.median(turn.cpu_seconds for turn in turns),
        "peak_bytes": max(turn.peak_bytes for turn in turns),
        "turns": [turn.seconds for turn in turns],
    }


def ratios(turns: Mapping[str, Sequence[Turn]]) -> dict[str, dict[str, float]]:
    """Of each peer that was measured beside its Gearshift way: how many times as long it took, as a whole and by phase
    (medians of the ratios within a turn), and its peak over Gearshift's."""
    found = {}
    for peer, own in AGAINST.items():
        if peer not in turns or own not in turns:
            continue
        pairs = list(zip(turns[peer], turns[own], strict=True))
        found[peer] = {"seconds": statistics.median(a.total / b.total for a, b in pairs)}
        for phase in PHASES:
            found[peer][phase] = statistics.median(a.seconds[phase] / b.seconds[phase] for a, b in pairs)
        found[peer]["cpu_seconds"] = statistics.median(a.cpu_seconds / b.cpu_seconds for a, b in pairs)
        found[peer]["peak_bytes"] = max(a.peak_bytes for a, _ in pairs) / max(b.peak_bytes for _, b in pairs)
    return found


def lines(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    width = max(map(len, rows))
    heads = ("s/step", *PHASES, "episodes/s", "tokens/s", "CPU s", "peak MiB")
    found = [f"{'':<{width}}" + "".join(f"{head:>12}" for head in heads)]
    for name, way in rows.items():
        seconds = [way["seconds"], *(way["phases"][phase] for phase in PHASES)]
        found.append(
            f"{name:<{width}}"
            + "".join(f"{value:12.3f}" for value in seconds)
            + f"{way['episodes_per_second']:12.2f}{way['generated_tokens_per_second']:12,.0f}"
            + f"{way['cpu_seconds']:12.2f}{way['peak_bytes'] / 2**20:12,.0f}"
        )
    return found


def ratio_lines(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    told = []
    for peer, ratio in found.items():
        phases = ", ".join(f"{phase} {ratio[phase]:.2f}" for phase in PHASES)
        told.append(
            f"{peer} takes {ratio['seconds']:.2f} times as long as {AGAINST[peer]} ({phases})"
            f", {ratio['cpu_seconds']:.2f} times the CPU time and {ratio['peak_bytes']:.2f} times the memory"
        )
    return told


def verdicts(found: Mapping[str, Mapping[str, float]], vocabulary: int) -> list[str]:
    """Whether each stated figure holds in this run."""
    told = []
    for peer, ratio in found.items():
        holds = "holds" if ratio["seconds"] >= SPEED[peer] else "MISSED"
        told.append(f"{holds:<8}{AGAINST[peer]}: {ratio['seconds']:.2f} times the episodes/s of {peer}, "
                    f"{SPEED[peer]:g} at least")  # fmt: skip
        if not peer.startswith("trl"):
            continue
        bound = MEMORY_LARGE_VOCABULARY if vocabulary >= LARGE_VOCABULARY else MEMORY
        share = 1 / ratio["peak_bytes"]
        holds = "holds" if share <= bound else "MISSED"
        told.append(
            f"{holds:<8}{AGAINST[peer]}: {share:.2f} of the peak memory per process of {peer}, {bound:g} at most"
        )
    return told


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Phases stacked, a bar for each way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["ways"]
    names = list(rows)
    figure, axes = pyplot.subplots(figsize=(8, 1.7 + 0.55 * len(names)))
    left = [0.0] * len(names)
    for phase, colour in zip(PHASES, ("#1f77b4", "#ff7f0e", "#2ca02c"), strict=True):
        widths = [rows[name]["phases"][phase] for name in names]
        axes.barh(names, widths, left=left, height=0.6, label=phase, color=colour)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for number, name in enumerate(names):
        axes.annotate(f" {rows[name]['seconds']:.2f} s, {rows[name]['peak_bytes'] / 2**20:,.0f} MiB",
                      (left[number], number), va="center", fontsize=9)  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlim(0, max(left) * 1.25)
    axes.set_xlabel("seconds per iteration (medians)")
    axes.grid(True, axis="x", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(PHASES), fontsize=9)
    axes.set_title(result["title"], fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
