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
from gearshift.engine.packing import Packed, Run, asked_now


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


@torch.no_grad()
def gives_what_is_asked(model: Any, world: World, run: Run) -> bool:
    """Whether a model that packs, and of which `bind_asked` has found a part, has the same outputs where they are asked
    for as it has without. Collective."""
    if last_feed_forward(model) is None:
        return False
    lengths = torch.tensor([7, 9], device=world.device)
    tokens = torch.arange(18, device=world.device).view(2, 9) * 31 % model.get_input_embeddings().num_embeddings
    asked = torch.zeros(2, 9, dtype=torch.bool, device=world.device)
    asked[0, 3:7] = asked[1, 0] = asked[1, 8] = True
    found = []
    for where in (None, asked):
        packed = Packed(lengths, 9)
        with packed.apart(where):
            found.append(packed.spread(run(packed.join(tokens), packed.positions))[asked])
    exact = next(model.parameters()).dtype == torch.float32
    bound = max(1.0, float(found[0].abs().max())) * (1e-5 if exact else 2e-2)
    spared = packed.sequences.spared
    return not world.max(float(not (spared and float((found[1] - found[0]).abs().max()) <= bound)))
