"""AdamW that leaves out rows of embeddings whose tokens no gradient has ever reached.

The moments of such a row are zeros, and without weight decay a step leaves it as it is: on a CPU the moments' pages are
not there, and no step touches it. Of a large vocabulary those are most rows for a long time.

Letters: V rows of a matrix, H columns, T rows that have a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gearshift.engine.memory import forget_zeros, take_small_pages, untouched_zeros

# The share of a matrix's rows from which a step takes all of it, and how many are taken at once: those that are picked
# out are copied to and fro.
MANY, BLOCK = 0.5, 4096


class Part(NamedTuple):
    """Of a flat parameter, from `start` to `end`; `rows [T]`: it is a matrix `[V, width]`, and this step's gradient is
    0 but in these."""

    start: int
    end: int
    rows: Tensor | None = None
    width: int = 1


class RowAdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov and Hutter, 1711.05101). A flat parameter that `parts` divides is stepped part by part,
    to the same result but for rounding at the ends of parts."""

    parts: Callable[[Tensor], Iterable[Part]] = staticmethod(lambda parameter: ())

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        # By parameter and start of a matrix: which rows [V] have moments.
        self._live: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        whole = []
        for group in self.param_groups:
            group["params"], all_of_it = [p for p in group["params"] if not self._step_rows(p, group)], group["params"]
            whole.append(all_of_it)
        try:
            return super().step(closure)
        finally:
            for group, parameters in zip(self.param_groups, whole, strict=True):
                group["params"] = parameters

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._live.clear()

    def _step_rows(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Whether it had rows to leave out, and has had its step."""
        gradient = parameter.grad
        if group["weight_decay"] != 0 or gradient is None:
            return False
        parts = list(self.parts(parameter))
        state = self.state[parameter]
        if not state and any(part.rows is not None for part in parts):
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = untouched_zeros(parameter), untouched_zeros(parameter)
        picked = [(part, self._picked(parameter, gradient, part, state)) for part in parts]
        if all(rows is None for _, rows in picked):
            return False
        tensors = (parameter.data, gradient, state["exp_avg"], state["exp_avg_sq"])
        for part, rows in picked:
            own = [t[part.start : part.end].view(-1, part.width) for t in tensors]
            if rows is None:
                _step(own, state["step"], group)
                continue
            for block in rows.split(BLOCK):
                taken = [t[block] for t in own]
                _step(taken, state["step"], group)
                for kind in (0, 2, 3):  # not the gradient
                    own[kind][block] = taken[kind]
        state["step"] += 1
        return True

    def _picked(self, parameter: Tensor, gradient: Tensor, part: Part, state: dict[str, Tensor]) -> Tensor | None:
        """The rows that a step changes. None: all."""
        if part.rows is None:
            for known in [k for k in self._live if k[0] == id(parameter) and part.start <= k[1] < part.end]:
                del self._live[known]
            return None
        key = id(parameter), part.start
        if key not in self._live:
            moments = [state[name][part.start : part.end].view(-1, part.width) for name in ("exp_avg", "exp_avg_sq")]
            self._live[key] = _not_zero(moments)
        live = self._live[key]
        # Those of last tokens get zeros. Who starts from a checkpoint cannot know of them.
        reached = gradient[part.start : part.end].view(-1, part.width)[part.rows].any(1)
        live[part.rows[reached]] = True
        rows = live.nonzero().flatten()
        return rows if len(rows) < MANY * len(live) else None


def _step(tensors: list[Tensor], number: Tensor, group: dict[str, Any]) -> None:
    """One step of weights, by their gradients and with both moments, in place; `number` of steps came before it."""
    weights, gradients, means, squares = tensors
    beta1, beta2 = group["betas"]
    adamw(
        [weights],
        [gradients],
        [means],
        [squares],
        max_exp_avg_sqs=[],
        state_steps=[number.clone()],  # which it counts up
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=0.0,
        eps=group["eps"],
        maximize=False,
    )


def _not_zero(moments: list[Tensor]) -> Tensor:
    """Which rows [V] of matrices [V, H] hold anything; the memory of others is given back."""
    for moment in moments:
        take_small_pages(moment)
    bounds = [bound != 0 for moment in moments for bound in moment.aminmax(dim=1)]
    live = torch.stack(bounds).any(0)
    dead = torch.nn.functional.pad(~live, (1, 1)).to(torch.int8).diff()
    starts, ends = (dead == 1).nonzero().flatten().tolist(), (dead == -1).nonzero().flatten().tolist()
    for start, end in zip(starts, ends, strict=True):
        for moment in moments:
            forget_zeros(moment[start:end])
    return live
