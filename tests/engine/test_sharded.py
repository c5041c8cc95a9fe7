"""Models that the plan of a shift would not fit are refused."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gearshift.engine.sharded import check_shards
from gearshift.errors import UserError


def sharded(numel: int, held: int, dtype: torch.dtype) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_numel = numel
    parameter.ds_tensor = SimpleNamespace(ds_numel=held, dtype=dtype)
    return parameter


def model(**parameters: nn.Parameter) -> nn.Module:
    module = nn.Module()
    for name, parameter in parameters.items():
        module.register_parameter(name, parameter)
    return module


def test_equal_shards_of_one_type_are_what_is_needed() -> None:
    check_shards(model(a=sharded(10, 3, torch.float32), b=sharded(8, 2, torch.float32)), ranks=4)


def test_shards_over_fewer_ranks_are_refused() -> None:
    with pytest.raises(UserError, match="cut over all 4 ranks; of a each has 5 of 10 elements"):
        check_shards(model(a=sharded(10, 5, torch.float32)), ranks=4)


def test_two_types_are_refused() -> None:
    with pytest.raises(UserError, match=r"of one type; these have torch\.bfloat16, torch\.float32"):
        check_shards(model(a=sharded(8, 2, torch.float32), b=sharded(8, 2, torch.bfloat16)), ranks=4)
