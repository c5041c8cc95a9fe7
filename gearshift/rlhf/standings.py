"""The table of a comparison: each system's figures from its answers, and the same as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gearshift.rlhf.statistics import bootstrap_mean, distinct, wins

# Key, heading, decimals of each column of the Markdown table; a column stands where some system has its figure.
COLUMNS = (
    ("true_score", "true score", 3),
    ("score", "reward score", 3),
    ("win_rate", "wins", 3),
    ("true_win_rate", "wins by true score", 3),
    ("kl", "KL, nats", 2),
    ("length", "length, tokens", 1),
    ("eos_rate", "EOS rate", 3),
    ("pretraining_loss", "loss on text, nats", 3),
    ("distinct_1", "distinct-1", 3),
    ("distinct_2", "distinct-2", 3),
)


def summary(answers: Sequence[dict[str, Any]], text_loss: float | None, resamples: int, seed: int) -> dict[str, float]:
    """Figures of one system: means over its answers, those of scores with the ends of their intervals.

    `eos_rate` is the part of the answers that ended by themselves, not at the limit.
    """
    found = bootstrap_mean([a["score"] for a in answers], resamples, seed).fields("score")
    if "true_score" in answers[0]:
        found |= bootstrap_mean([a["true_score"] for a in answers], resamples, seed).fields("true_score")
    for key, field in (("kl", "kl"), ("length", "length"), ("eos_rate", "finished")):
        found[key] = sum(a[field] for a in answers) / len(answers)
    texts = [a["response"] for a in answers]
    found |= {"distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2)}
    if text_loss is not None:
        found["pretraining_loss"] = text_loss
    return found


def win_rates(
    answers: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], resamples: int, seed: int
) -> dict[str, float]:
    """How often a system's answer beats the other's to the same prompt, ties half: by the reward model's score
    (`win_rate`) and, where there is a checker, by the true score (`true_win_rate`); with intervals over prompts."""
    if [a["id"] for a in answers] != [b["id"] for b in others]:
        raise ValueError("win rates need two systems' answers to the same prompts in the same order")
    pairs = list(zip(answers, others, strict=True))
    same = [(a["response"], a["finished"]) == (b["response"], b["finished"]) for a, b in pairs]
    found: dict[str, float] = {}
    for key, name in (("score", "win_rate"), ("true_score", "true_win_rate")):
        if key in answers[0]:
            won = wins([a[key] for a in answers], [b[key] for b in others], same)
            found |= bootstrap_mean(won, resamples, seed).fields(name)
    return found


def markdown(systems: dict[str, dict[str, Any]], against: str | None) -> str:
    """The table, what its columns mean, and the candidates of each prefix that was chosen."""
    columns = [column for column in COLUMNS if any(column[0] in figures for figures in systems.values())]
    lines = [_row(["system", *(heading for _, heading, _ in columns)]), "|---" + "|---:" * len(columns) + "|"]
    for name, figures in systems.items():
        lines.append(_row([name, *(_cell(figures, key, decimals) for key, _, decimals in columns)]))
    held = f" Wins are over the answers of {against} to the same prompts, a tie half." if against else ""
    lines += ["", "In brackets: 95% bootstrap intervals over prompts." + held, ""]
    for name, figures in systems.items():
        if figures.get("prefixes"):
            lines += [f"Prefixes tried for {name}, by reward score on the selection prompts:", ""]
            lines += [_row(["prefix", "reward score", "chosen"]), "|---|---:|---|"]
            for one in figures["prefixes"]:
                text = json.dumps(one["prefix"], ensure_ascii=False)
                lines.append(_row([f"`{text}`", _cell(one, "score", 3), "yes" if one["chosen"] else ""]))
            lines.append("")
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cell(figures: dict[str, Any], key: str, decimals: int) -> str:
    if key not in figures:
        return "-"
    shown = [
        f"{round(figures[k], decimals) + 0.0:.{decimals}f}" for k in (key, f"{key}_low", f"{key}_high") if k in figures
    ]
    return shown[0] if len(shown) == 1 else f"{shown[0]} [{shown[1]}, {shown[2]}]"
