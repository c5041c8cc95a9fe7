"""A checkpoint of some ranks read by others: every parameter's shards cut anew, as DeepSpeed asks for its files.

Nothing is converted and no second checkpoint is written (DeepSpeed's universal one is both, unpickles whatever its
files hold, and knows Adam's moments alone): a rank maps the files of those whose shards lie over its own, and reads
what it needs of them. Elements are copied, never computed with.

Rank r of N holds elements [r·s, (r+1)·s) of a parameter, s = ceil(numel / N), with padding past its end; its shards of
a group of parameters lie one after another in a flat tensor, and so do the group's moments and moving average.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gearshift.engine.checkpoints.model_shards import MODEL_FILE, places_of
from gearshift.engine.checkpoints.shards import Shards, load

Shapes = list[dict[str, torch.Size]]  # of each group: parameter -> whole shape
_RANK = re.compile(r"zero_pp_rank_\d+_")


def recut(shard: Callable[[int], Tensor], old: int, numel: int, rank: int, ranks: int) -> Tensor:
    """Rank `rank`'s flat shard of a parameter, from those of `old` ranks (`shard(r)`: of one, called where needed)."""
    before, size = max(1, -(-numel // old)), -(-numel // ranks)
    low, high = min(numel, rank * size), min(numel, (rank + 1) * size)
    parts = []
    for number in range(low // before, -(-high // before)):
        start, stop = max(low, number * before), min(high, (number + 1) * before)
        parts.append(shard(number)[start - number * before : stop - number * before])
    padding = size - (high - low)
    if padding or not parts:
        parts.append((parts[0] if parts else shard(0)).new_zeros(padding))
    return torch.cat(parts)


class Recut(Shards):
    """What `Shards` reads, for rank `rank` of `ranks` from the files of `old` ranks. One for each model."""

    def __init__(self, root: Path, old: int, rank: int, ranks: int):
        super().__init__(root)
        self.old, self.rank, self.ranks = old, rank, ranks
        self._now: Shapes = []
        self._opened: dict[Path, Any] = {}

    @contextmanager
    def serving(self, engine: Any) -> Iterator[None]:
        self._now = engine._get_zero_param_shapes()
        # DeepSpeed looks whether its file is there. Rank 0's is, and `load` asks for no more than its name.
        engine._get_all_ckpt_names = lambda folder, name: [f"{folder}/{name}/{MODEL_FILE.format(0)}"]
        try:
            with super().serving(engine):
                yield
        finally:
            del engine._get_all_ckpt_names
            self._opened.clear()

    def load(self, path: str, map_location: Any = None) -> Any:
        """Not what is in a file of this name, but what would be had it been written by as many ranks as there are."""
        name = Path(path)
        return self._model(name.parent) if name.name.endswith("model_states.pt") else self._optimizer(name)

    def _of(self, path: Path, rank: int) -> Any:
        """What the file of that rank holds; mapped, and read where it is used."""
        path = path.with_name(_RANK.sub(f"zero_pp_rank_{rank}_", path.name))
        if path not in self._opened:
            self._opened[path] = load(path, mmap=True)
        return self._opened[path]

    def _model(self, folder: Path) -> dict[str, Any]:
        path = folder / MODEL_FILE.format(0)
        state = dict(self._of(path, 0))
        state |= {"dp_world_size": self.ranks, "param_shapes": self._now}
        frozen = state.get("frozen_param_shapes") or {}
        state["frozen_param_fragments"] = {
            name: self._recut(partial(self._frozen, path, name), shape.numel()) for name, shape in frozen.items()
        }
        if state.get("average") is not None:
            state["average"] = self._groups(folder, lambda r: self._of(path, r)["average"])
        return state

    def _frozen(self, path: Path, name: str, rank: int) -> Tensor:
        fragment: Tensor = self._of(path, rank)["frozen_param_fragments"][name]
        return fragment

    def _optimizer(self, path: Path) -> dict[str, Any]:
        whole = dict(self._of(path, 0))
        zero = whole["optimizer_state_dict"] = dict(whole["optimizer_state_dict"])
        inner = zero["optimizer_state_dict"] = dict(zero["optimizer_state_dict"])

        def masters(rank: int) -> list[Tensor]:
            found: list[Tensor] = self._of(path, rank)["optimizer_state_dict"]["fp32_flat_groups"]
            return found

        inner["state"] = self._moments(path, inner["state"])
        (group,) = inner["param_groups"]  # Gearshift's optimizers have one
        inner["param_groups"] = [{**group, "params": list(range(len(self._now)))}]
        zero["fp32_flat_groups"] = self._groups(path.parent, masters)
        return whole

    def _moments(self, path: Path, first: dict[int, Any]) -> dict[int, Any]:
        """The optimizer's state of each group as there are now: flat tensors cut anew, counts as they are."""
        if not first:
            return {}

        def of(key: str) -> Callable[[int], list[Tensor]]:
            def each(rank: int) -> list[Tensor]:
                state = self._of(path, rank)["optimizer_state_dict"]["optimizer_state_dict"]["state"]
                return [state[group][key] for group in range(len(first))]

            return each

        flat = [key for key, value in first[0].items() if torch.is_tensor(value) and value.dim() == 1]
        cut = {key: self._groups(path.parent, of(key)) for key in flat}
        counts = {key: value for key, value in first[0].items() if key not in cut}
        # Counts are cloned: each group's is stepped by itself, and nothing may hold on to the mapped file.
        return {
            group: copy.deepcopy(counts) | {key: cut[key][group] for key in flat} for group in range(len(self._now))
        }

    def _groups(self, folder: Path, flats: Callable[[int], Sequence[Tensor]]) -> list[Tensor]:
        """The flat tensor of each group as there are now. `flats(rank)`: those that a rank has written."""
        before: Shapes = self._of(folder / MODEL_FILE.format(0), 0)["param_shapes"]
        places = places_of(before, self.old)

        def shard(name: str, rank: int) -> Tensor:
            place = places[name]
            return flats(rank)[place.group][place.start : place.start + -(-place.shape.numel() // self.old)]

        return [
            torch.cat([self._recut(partial(shard, name), shape.numel()) for name, shape in shapes.items()])
            for shapes in self._now
        ]

    def _recut(self, shard: Callable[[int], Tensor], numel: int) -> Tensor:
        return recut(shard, self.old, numel, self.rank, self.ranks)
