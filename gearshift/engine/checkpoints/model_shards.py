"""DeepSpeed's ZeRO-3 files of one model, those of all its ranks, mapped: any tensor of it whole, one at a time.

Rank r holds elements [r·s, (r+1)·s) of a parameter, s = ceil(numel / ranks); of the last rank's part, what is past the
parameter's end is padding. What trains lies in the optimizer's flat groups, one parameter after another; what does not
(the weights below adapters) as a fragment of its own; buffers are whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gearshift.engine.checkpoints.shards import load
from gearshift.errors import UserError

MODEL_FILE = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
_OPTIMIZER_FILE = re.compile(r".*zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


@dataclass(frozen=True)
class Place:
    """Of a trained parameter: its optimizer group, where in each rank's flat part of it, and its whole shape."""

    group: int
    start: int
    shape: torch.Size


@dataclass(frozen=True)
class ModelShards:
    """`trained`, `frozen`: the parameters, each in the order of its files. `_flats`: by rank and group."""

    trained: Mapping[str, Place]
    frozen: Mapping[str, torch.Size]
    _states: list[dict[str, Any]]
    _flats: list[list[Tensor]]

    @classmethod
    def open(cls, folder: Path, raw: bool = False) -> ModelShards:
        """Of a model's folder (`step-.../policy`). What trains is read as its moving average where one was kept and
        `raw` does not ask for the fp32 masters. Raises UserError naming a file that is not as it should be."""
        optimizer_files = _optimizer_files(folder)
        model_files = [folder / MODEL_FILE.format(rank) for rank in range(len(optimizer_files))]
        states = [load(path, mmap=True) for path in model_files]
        flats = [state.get("average") for state in states]
        if raw or None in flats:
            flats = [_fp32_groups(load(path, mmap=True), path) for path in optimizer_files]
        try:
            places = places_of(states[0]["param_shapes"], len(states))
            return cls(places, states[0]["frozen_param_shapes"] or {}, states, flats)
        except (KeyError, AttributeError):
            raise UserError(f"{model_files[0]}: holds no shapes of parameters") from None

    @property
    def ranks(self) -> int:
        return len(self._states)

    def whole(self, name: str) -> Tensor:
        """A trained parameter, fp32."""
        place = self.trained[name]
        size = -(-place.shape.numel() // self.ranks)
        flat = torch.cat([groups[place.group][place.start : place.start + size] for groups in self._flats])
        return flat[: place.shape.numel()].view(place.shape)

    def frozen_whole(self, name: str) -> Tensor:
        """A parameter that does not train, in its own type."""
        shape = self.frozen[name]
        flat = torch.cat([state["frozen_param_fragments"][name] for state in self._states])
        return flat[: shape.numel()].view(shape)

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Those that belong to the weights (a router's correction bias), the same on every rank."""
        for name in self._states[0]["buffer_names"]:
            yield name, self._states[0]["module"][name]


def places_of(shapes: list[dict[str, torch.Size]], ranks: int) -> dict[str, Place]:
    """Where the flat parts of `ranks` ranks hold each parameter, from the shapes in each group."""
    places = {}
    for group, parameters in enumerate(shapes):
        start = 0
        for name, shape in parameters.items():
            places[name] = Place(group, start, shape)
            start += -(-shape.numel() // ranks)
    return places


def _optimizer_files(folder: Path) -> list[Path]:
    """Those of rank 0, 1, ..."""
    matches = (_OPTIMIZER_FILE.fullmatch(path.name) for path in folder.iterdir())
    paths = {int(match[1]): folder / match[0] for match in matches if match}
    if sorted(paths) != list(range(len(paths))) or not paths:
        raise UserError(f"{folder}: holds no shards of ranks 0 to {max(paths, default=0)}")
    return [paths[rank] for rank in range(len(paths))]


def _fp32_groups(state: Any, path: Path) -> list[Tensor]:
    try:
        flat: list[Tensor] = state["optimizer_state_dict"]["fp32_flat_groups"]
    except (KeyError, TypeError):
        raise UserError(f"{path}: holds no fp32 weights") from None
    return flat
