"""What is said and kept of values that are not finite."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import Episodes, TokenBatch, World
from gearshift.errors import NotFinite, UserError
from gearshift.rlhf.guards import require_finite, stopping

WORLD = World(rank=1, size=2, local_rank=1, local_size=2, device=torch.device("cpu"))


def episodes(rows: int = 12) -> Episodes:
    shapes: dict[str, Any] = {f.name: torch.zeros(rows, 3) for f in dataclasses.fields(Episodes)}
    shapes |= {"ids": torch.arange(100, 100 + rows), "scores": torch.zeros(rows)}
    return Episodes(**shapes)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["scores", "logprobs", "ref_logprobs", "values", "advantages"])
def test_ranks_and_prompts_are_named(name: str, value: float) -> None:
    batch = episodes()
    require_finite(batch, WORLD)
    getattr(batch, name)[5] = value
    with pytest.raises(NotFinite, match=rf"^{name} is not finite for prompt 105 \(rank 0\); no weight was changed$"):
        require_finite(batch, WORLD)
    getattr(batch, name)[7] = value
    with pytest.raises(NotFinite, match=r"for prompts 105, 107 \(ranks 0, 1\)"):
        require_finite(batch, WORLD)
    getattr(batch, name)[:] = value
    with pytest.raises(NotFinite, match=r"106, 107 and 4 more \(ranks 0, 1\)"):
        require_finite(batch, WORLD)


def test_the_batch_is_written_out(tmp_path: Path) -> None:
    batch = TokenBatch(torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.int64))
    with (
        pytest.raises(UserError, match=rf"^step 3: the loss is nan; the batch is in {tmp_path}/stopped/$"),
        stopping(str(tmp_path), "step 3", batch, WORLD),
    ):
        raise NotFinite("the loss is nan")
    kept = torch.load(tmp_path / "stopped/step-3-rank-1.pt", weights_only=True)
    assert torch.equal(kept["tokens"], batch.tokens)
    with pytest.raises(UserError, match=r"^something else$"), stopping(str(tmp_path), "step 4", batch, WORLD):
        raise UserError("something else")
    assert len(list((tmp_path / "stopped").iterdir())) == 1
