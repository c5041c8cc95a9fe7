"""Learning rates over a run, as factors of the peak rate."""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine(steps: int, warmup: int, final: float) -> Callable[[int], float]:
    """Linear warm-up over `warmup` steps, then a half cosine from 1 to `final` at the last of `steps` steps."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def constant(warmup: int, first: float = 0.0) -> Callable[[int], float]:
    """1 after `warmup` steps that rise in equal parts: from `first` (of PPO, one tenth: InstructGPT C.4) to 1."""

    def factor(step: int) -> float:
        return 1.0 if step >= warmup else first + (1 - first) * (step + (first == 0.0)) / warmup

    return factor
