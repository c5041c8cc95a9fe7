"""`policy_loss` beside its plain definition by autograd, with and without the metrics, and torch.compile of both.

python -m benchmarks.kernels.policy_loss [--sequences B] [--lengths L ...] [--repeats N]
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernels.command import parse
from benchmarks.kernels.losses import run
from gearshift.kernels import Loss, policy_loss
from gearshift.kernels.policy_loss import plain as definition

TOKENS, CLIP = 100_000, 0.2


def main() -> None:
    run("policy_loss", parse(__doc__ or ""), ours, plain, counted)


def ours(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Loss:
    return policy_loss(new, old, advantages, mask, clip=CLIP, tokens=TOKENS)


def plain(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return definition(new, old, advantages, mask, clip=CLIP, tokens=TOKENS)


def counted(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Loss:
    """With what a training loop logs, as ours has it."""
    loss = plain(new, old, advantages, mask)
    with torch.no_grad():
        log_ratio = (new - old).masked_fill(~mask, 0.0)
        ratio = log_ratio.exp()
        clipped = (ratio.clamp(1 - CLIP, 1 + CLIP) * advantages < ratio * advantages) & mask
        metrics = {
            "tokens": mask.sum(),
            "clipped": clipped.sum(),
            "approx_kl": (torch.expm1(log_ratio) - log_ratio).sum(dtype=torch.float64),
            "ratio": ratio.masked_fill(~mask, 0.0).sum(dtype=torch.float64),
        }
    return Loss(loss, metrics)


if __name__ == "__main__":
    main()
