"""`flash_decode` hands flash-attn what `decode_attention` means: checked with a kernel of the same signature."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gearshift.kernels import Columns, decode_attention, flash_decode
from tests.kernels.flash import flash_attn_with_kvcache
from tests.kernels.test_decode_attention import CAPACITY, make


@pytest.mark.parametrize("window", [None, 1, 8, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("width", [None, CAPACITY])
def test_matches_decode_attention(window: int | None, softcap: float | None, width: int | None) -> None:
    ours, theirs = make(), make()
    theirs["columns"] = Columns(theirs["columns"].positions, width)
    settings: dict[str, Any] = {"scaling": 0.7, "window": window, "softcap": softcap}
    want = decode_attention(**ours, **settings)
    got = flash_decode(flash_attn_with_kvcache, **theirs, **settings)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
    for name in ("keys", "values"):
        assert torch.equal(ours[name], theirs[name])


def test_a_row_that_nobody_reads_leaves_what_its_cache_holds() -> None:
    inputs = make()
    positions = inputs["columns"].positions.clone()
    positions[2] = -1
    inputs["columns"] = Columns(positions, CAPACITY)
    before = inputs["keys"][2].clone()
    flash_decode(flash_attn_with_kvcache, **inputs, scaling=0.7)
    assert torch.equal(inputs["keys"][2, :, :-1], before[:, :-1])
    assert inputs["columns"].lengths.tolist() == [1, CAPACITY, 1, 17, 4]
