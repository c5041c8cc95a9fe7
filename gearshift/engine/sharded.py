"""What ZeRO-3 keeps of a model's parameters on this rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.engine.adapters import is_adapter, merged_weights, plain_name
from gearshift.engine.shift import Shards
from gearshift.errors import UserError


def check_shards(module: Any, ranks: int) -> None:
    """Raises UserError for a model that the plan of a shift would not fit."""
    dtypes = {parameter.ds_tensor.dtype for parameter in module.parameters()}
    if len(dtypes) > 1:
        raise UserError(f"rollouts need parameters of one type; these have {', '.join(sorted(map(str, dtypes)))}")
    for name, parameter in module.named_parameters():
        held, whole = parameter.ds_tensor.ds_numel, parameter.ds_numel
        if held != -(-whole // ranks):
            raise UserError(
                f"rollouts need parameters that are cut over all {ranks} ranks; of {name} each has {held} of {whole} "
                "elements: leave sequence_parallel_size, tensor_parallel and the like out of the deepspeed section"
            )


def held_names(module: Any) -> set[str]:
    """Parameters that every rank keeps whole between steps: those within `stage3_param_persistence_threshold`."""
    return {name for name, parameter in _plain_parameters(module) if parameter.ds_persist}


def has_own_memory(parameter: Any) -> bool:
    """Its shard shares its memory with no other: those of frozen parameters do not, those of an optimizer's do."""
    shard: Tensor = parameter.ds_tensor
    return shard.untyped_storage().nbytes() == shard.nbytes


def lay_together(parameters: Sequence[Any]) -> None:
    """Shards that have memory of their own, one after the other in one piece of it."""
    shards = [parameter.ds_tensor for parameter in parameters]
    for shard, part in zip(shards, torch.cat(shards).split([shard.numel() for shard in shards]), strict=True):
        shard.data = part


def weights_in_place(module: Any, device: torch.device) -> dict[str, Tensor] | None:
    """On one rank: each weight in its shape, where ZeRO-3 keeps it. None where it is not what a rollout reads: it has
    adapters beside it, or lies elsewhere than on `device`."""
    found = {}
    for name, parameter in module.named_parameters():
        shard = parameter.ds_tensor
        if is_adapter(name) or shard.device.type != device.type or shard.numel() != parameter.ds_numel:
            return None
        found[name] = shard.detach().view(parameter.ds_shape)
    return found


def zero_shards(module: Any) -> Shards:
    """The newest weights, adapters merged, else not copied. After a step a shard is the authoritative copy, and the
    parameters that are kept whole have been gathered anew. Collective for a model with adapters, and where what is kept
    whole is not there (before the first forward)."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    kept = {name: p for name, p in _plain_parameters(module) if p.ds_persist}
    if any(p.ds_status != ZeroParamStatus.AVAILABLE for p in kept.values()):
        next(iter(kept.values())).all_gather(list(kept.values()))
    own = {name: p.ds_tensor for name, p in _plain_parameters(module) if name not in kept}
    whole = {name: p.data.view(-1) for name, p in kept.items()}
    for name, merged in merged_weights(module, own, dist.get_rank()):
        (own if name in own else whole)[name] = merged
    return Shards(own, whole)


def _plain_parameters(module: Any) -> Iterator[tuple[str, Any]]:
    """The model's own, under the names that they have without adapters."""
    return ((plain_name(name), p) for name, p in module.named_parameters() if not is_adapter(name))
