"""The last layer's feed-forward, computed for the tokens whose output somebody asks for.

After the last attention no token sees another. What follows of a prompt's tokens, of which PPO asks for the last one's
alone, is work for nobody: in a model of L layers the feed-forward of one, for that part of all tokens.
Letters: N tokens of a packed row, n of them asked for, H features.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.engine.distributed import World
from gearshift.engine.packing import Run, Trial, asked_now


def last_feed_forward(model: Any) -> nn.Module | None:
    """`mlp` of a `transformers` model's last layer, if it is made of plain linear layers and takes one tensor."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    found = getattr(lists[0][-1], "mlp", None) if len(lists) == 1 else None
    if not isinstance(found, nn.Module) or len(inspect.signature(type(found).forward).parameters) != 2:
        return None
    inside = [m for m in found.modules() if m._parameters]
    linears = [m for m in inside if type(m) is nn.Linear]
    plain = inside == linears and inside and linears[-1].out_features == linears[0].in_features
    return found if plain else None


def bind_asked(model: Any) -> None:
    """What of a packed row nobody has asked for (`Packed.apart`) goes past the last feed-forward as zeros."""
    module = last_feed_forward(model)
    if module is None:
        return
    own = module.forward

    @functools.wraps(own)
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        rows = asked_now(x)
        found: Tensor = own(x if rows is None else x.index_select(1, rows))
        return found if rows is None else found.new_zeros(x.shape).index_copy(1, rows, found)

    module.forward = types.MethodType(forward, module)


def gives_what_is_asked(model: Any, world: World, run: Run) -> bool:
    """Whether a model that packs, and of which `bind_asked` has found a part, has the same outputs where they are asked
    for as it has without. Collective."""
    if last_feed_forward(model) is None:
        return False
    trial = Trial(model, world, run)
    asked = torch.zeros_like(trial.tokens, dtype=torch.bool)
    asked[0, 3:7] = asked[1, 0] = asked[1, 8] = True
    (right, _), (found, rows) = trial.packed(), trial.packed(asked)
    return not world.max(float(not (rows.sequences.spared and trial.agree(found[asked], right[asked]))))
