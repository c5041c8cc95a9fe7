"""What stops a run before a value that is not finite reaches a weight, and what is left for study."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gearshift.engine import Episodes, Rows, World
from gearshift.errors import EveryRank, NotFinite

FOLDER = "stopped"
_CHECKED = ("scores", "logprobs", "ref_logprobs", "values", "advantages")


def require_finite(episodes: Episodes, world: World) -> None:
    """Raises NotFinite naming ranks and prompts. Every rank holds the same episodes, so every rank stops."""
    for name in _CHECKED:
        tensor = getattr(episodes, name)
        rows = (~tensor.isfinite()).flatten(1).any(1) if tensor.dim() > 1 else ~tensor.isfinite()
        if bool(rows.any()):
            at = rows.nonzero()[:, 0]
            ranks = sorted({int(row) * world.size // len(episodes) for row in at})  # joined in rank order
            ids = [int(episodes.ids[row]) for row in at[:8]]
            more = f" and {len(at) - 8} more" if len(at) > 8 else ""
            raise NotFinite(
                f"{name} is not finite for {_listed('prompt', ids)}{more} ({_listed('rank', ranks)}); "
                "no weight was changed"
            )


@contextmanager
def stopping(folder: str, step: str, batch: Rows, world: World) -> Iterator[None]:
    """A NotFinite in here becomes an EveryRank that begins with `step` ("iteration 3"); the batch is written out.

    Every rank writes its own rows, to `folder`/stopped/: a file of tensors that `torch.load` reads.
    """
    try:
        yield
    except NotFinite as error:
        path = Path(folder) / FOLDER / f"{step.replace(' ', '-')}-rank-{world.rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}, path)
        raise EveryRank(f"{step}: {error}; the batch is in {path.parent}/") from None


def _listed(what: str, numbers: list[int]) -> str:
    return f"{what}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
