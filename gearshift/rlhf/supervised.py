"""The loop that pretraining, SFT and reward-model training share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from gearshift.engine import Rows, spans, watchdog
from gearshift.engine.zero import LossFunction, ZeroModel
from gearshift.rlhf.best import Best
from gearshift.rlhf.guards import stopping
from gearshift.rlhf.reporting import Report
from gearshift.rlhf.resuming import Saver

SCORE = "validation/scores"  # where a validation has it, it says how good a model is; else its loss does
Validate = Callable[[], dict[str, float]]


def fit(
    model: ZeroModel,
    loss: LossFunction,
    batches: Iterator[Rows],
    steps: int,
    report: Report,
    validate: Validate,
    validate_every: int,
    saver: Saver,
    best: Best | None = None,
) -> dict[str, float]:
    """`steps` optimizer steps of one batch each; returns the last validation's metrics.

    `batches` yields this rank's rows of each global batch. `validate` runs every `validate_every` steps (0: only at
    the end) and always after the last; `best` keeps the model that did best in it. The run goes on from where
    `saver` is, which saves it as it goes.
    """
    found: dict[str, float] = {}
    with watchdog.watching(model.world, saver.config.run.hang_seconds), saver.running():
        for step in range(saver.done + 1, steps + 1):
            with spans.step(step):
                metrics = _step(model, loss, next(batches), step, saver.config.run.folder)
            validated = step == steps or bool(validate_every and step % validate_every == 0)
            if validated:
                with watchdog.phase(f"the validation after step {step}"):
                    found = validate()
                metrics.update(found)
            report.log(step, metrics)
            score = found.get(SCORE, -found["loss/validation"]) if validated and found else None
            if best is not None and score is not None and validate_every:  # of one validation, the best is the last
                best.offer(step, score)
            saver.after(step, score)
    saver.close()
    return found


def _step(model: ZeroModel, loss: LossFunction, batch: Rows, step: int, folder: str) -> dict[str, float]:
    """One optimizer step; returns its metrics. What is not finite in it stops every rank."""
    start, rate = time.perf_counter(), model.learning_rate
    with watchdog.phase(f"step {step}"), stopping(folder, f"step {step}", batch, model.world):
        sums = model.accumulate(loss, batch)
        norm = model.step()
    seconds = time.perf_counter() - start
    return {
        "loss/train": float(sums["loss"]),
        "optimizer/learning_rate": rate,
        "optimizer/grad_norm": norm,
        "timing/step": seconds,
        "throughput/tokens_per_second": float(sums["tokens"]) / seconds,
    }


def evaluate(model: ZeroModel, loss: LossFunction, rows: list[Any], collate: Callable[..., Rows]) -> dict[str, Tensor]:
    """The loss (under "loss") and its summed metrics over all rows, each rank on its share. Collective."""
    mine = rows[model.world.share(len(rows))] or [None]
    return model.evaluate(loss, collate(mine))
