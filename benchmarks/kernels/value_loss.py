"""`value_loss` beside its plain definition by autograd, with and without the metrics, and torch.compile of both.

python -m benchmarks.kernels.value_loss [--sequences B] [--lengths L ...] [--repeats N]
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernels.command import parse
from benchmarks.kernels.losses import run
from gearshift.kernels import Loss, value_loss
from gearshift.kernels.value_loss import plain as definition

TOKENS, CLIP = 100_000, 0.2


def main() -> None:
    run("value_loss", parse(__doc__ or ""), ours, plain, counted)


def ours(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> Loss:
    return value_loss(values, old, returns, mask, clip=CLIP, tokens=TOKENS)


def plain(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    return definition(values, old, returns, mask, clip=CLIP, tokens=TOKENS)


def counted(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> Loss:
    """With what a training loop logs, as ours has it."""
    loss = plain(values, old, returns, mask)
    with torch.no_grad():
        near = old + (values - old).clamp(-CLIP, CLIP)
        error, target = ((returns - values).masked_fill(~mask, 0.0), returns.masked_fill(~mask, 0.0))
        clipped = ((near - returns).square() > (values - returns).square()) & mask
        metrics = {
            "tokens": mask.sum(),
            "clipped": clipped.sum(),
            "returns": target.sum(dtype=torch.float64),
            "returns_sq": target.double().square().sum(),
            "error": error.sum(dtype=torch.float64),
            "error_sq": error.double().square().sum(),
        }
    return Loss(loss, metrics)


if __name__ == "__main__":
    main()
