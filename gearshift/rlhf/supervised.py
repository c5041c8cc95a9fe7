"""The loop that pretraining, SFT and reward-model training share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from gearshift.engine import Rows
from gearshift.engine.zero import LossFunction, ZeroModel
from gearshift.rlhf.reporting import Report
from gearshift.rlhf.resuming import Saver

Validate = Callable[[], dict[str, float]]


def fit(
    model: ZeroModel,
    loss: LossFunction,
    batches: Iterator[Rows],
    steps: int,
    report: Report,
    validate: Validate,
    validate_every: int = 0,
    saver: Saver | None = None,
) -> dict[str, float]:
    """`steps` optimizer steps of one batch each; returns the last validation's metrics.

    `batches` yields this rank's rows of each global batch. `validate` runs every `validate_every` steps (0: only at
    the end) and always after the last. With `saver` the run goes on from where that is, and is saved as it goes.
    """
    found: dict[str, float] = {}
    for step in range(saver.done + 1 if saver else 1, steps + 1):
        start = time.perf_counter()
        rate = model.learning_rate
        sums = model.accumulate(loss, next(batches))
        norm = model.step()
        seconds = time.perf_counter() - start
        metrics = {
            "loss/train": float(sums["loss"]),
            "optimizer/learning_rate": rate,
            "optimizer/grad_norm": norm,
            "timing/step": seconds,
            "throughput/tokens_per_second": float(sums["tokens"]) / seconds,
        }
        validated = step == steps or bool(validate_every and step % validate_every == 0)
        if validated:
            found = validate()
            metrics.update(found)
        report.log(step, metrics)
        if saver:
            saver.after(step, -found["loss/validation"] if validated and found else None)
    return found


def evaluate(model: ZeroModel, loss: LossFunction, rows: list[Any], collate: Callable[..., Rows]) -> dict[str, Tensor]:
    """The loss (under "loss") and its summed metrics over all rows, each rank on its share. Collective."""
    mine = rows[model.world.share(len(rows))] or [None]
    return model.evaluate(loss, collate(mine))
