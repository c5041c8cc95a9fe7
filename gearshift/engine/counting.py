"""What the models' calls add to a profile: the work of a batch, a generation, an optimizer step, a shift."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gearshift.engine import spans
from gearshift.engine.batches import Rollouts, Rows, TokenBatch
from gearshift.engine.room import position_bytes
from gearshift.engine.work import Weights, Work, optimizer_bytes

if TYPE_CHECKING:
    from gearshift.engine.replica import Replica
    from gearshift.engine.zero import ZeroModel


def count_pass(module: Any, batch: Rows, backward: bool = False, ends: bool = False) -> None:
    """A forward over this rank's rows, and the backward pass. `ends`: each row is asked for its last token alone."""

    def work() -> Work:
        lengths, targets = sequences(batch)
        return Work(Weights.of(module).pass_flops(lengths, len(batch) if ends else targets, backward))

    spans.count(work)


def count_step(model: ZeroModel) -> None:
    """An optimizer step on this rank's part of the weights."""

    def work() -> Work:
        training = model.training
        assert training is not None
        trained = sum(
            int(getattr(p, "ds_numel", None) or p.numel()) for p in model.module.parameters() if p.requires_grad
        )
        moments = 2 if training.optimizer == "adamw" else 0
        each = optimizer_bytes(model.dtype.itemsize, moments, model.average is not None)
        return Work(0.0, each * trained / model.world.size)

    spans.count(work)


def count_shift(replica: Replica) -> None:
    """Every weight of this rank's slices is read from somewhere and written once."""
    spans.count(lambda: Work(0.0, 2.0 * sum(t.nbytes for t in replica.slices.values())))


def count_generation(replica: Replica, rollouts: Rollouts, slots: int) -> None:
    """The rows of a tensor-parallel group, on this one of its ranks. Rows of one prompt share its prefill."""

    parts, dtype = replica.group.size, replica.head.weight.dtype

    def weights() -> Weights:
        return Weights.of(replica.model, parts)

    def prefill() -> Work:
        distinct = {tuple(row[:n]) for row, n in zip(rollouts.tokens.tolist(), rollouts.lengths.tolist(), strict=True)}
        return weights().prefill([len(prompt) for prompt in distinct], len(rollouts), dtype.itemsize)

    def decode() -> Work:
        bytes_of_position = position_bytes(replica.model.config, parts, dtype)
        return weights().decode(
            rollouts.lengths.tolist(), rollouts.mask.sum(1).tolist(), slots, dtype.itemsize, bytes_of_position
        )

    if len(rollouts):
        spans.count(prefill)
        spans.count(decode)


def sequences(batch: Rows) -> tuple[list[int], int]:
    """Lengths of a batch's sequences without their padding, and of how many of their tokens something is asked."""
    if isinstance(batch, Rollouts):
        return batch.sizes.tolist(), int(batch.mask.sum())
    if isinstance(batch, TokenBatch):
        return batch.sizes.tolist(), int(batch.loss_count)
    lengths: torch.Tensor = batch.lengths  # type: ignore[attr-defined]
    return lengths.flatten().tolist(), int((lengths > 0).sum())
