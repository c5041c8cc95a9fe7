"""The rollout gear on paper: prompts at once, drawing, adapters merged into weights, and seconds of a shift."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from benchmarks.plan_runs import llama
from gearshift.engine.hybrid import KEPT_CACHE_BYTES
from gearshift.engine.reshard import Traffic
from gearshift.engine.settings import LoraSettings
from gearshift.launch.planner import rollouts
from gearshift.launch.planner.models import causal
from gearshift.launch.planner.passes import Sharding
from gearshift.launch.planner.rollouts import PaperReplica, Rollouts, cache_is_kept, merged_bytes, shift_seconds
from gearshift.launch.planner.window import ZeroSettings

SHAPE = AutoConfig.for_model(**llama(32, 2, 2, 2, 64))


def test_a_forward_over_prompts_has_no_more_tokens_than_the_engine_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "PREFILL_TOKENS", 25)
    replica = PaperReplica(SHAPE, 1, torch.float32)
    one, two, many = (replica.prefill(Rollouts(9, slots, 12, 20)) for slots in (1, 2, 9))
    assert one < two == many


def test_to_truncate_sorts_the_logits() -> None:
    """Of the part of the vocabulary that a rank has."""
    replica = PaperReplica(SHAPE, 2, torch.float32)
    assert replica.draw(5, False) == 3 * 5 * 32 * 4
    assert replica.draw(5, True) == 5 * 5 * 32 * 4


def test_a_rank_merges_its_shards_of_the_adapted_weights() -> None:
    pytest.importorskip("peft")
    model = causal(SHAPE, torch.bfloat16, True, LoraSettings(rank=4))
    layer = 4 * 32 * 32 + 3 * 32 * 88
    assert merged_bytes(model, Sharding(2, 2, ZeroSettings())) == 2 * layer // 2 * 2
    assert merged_bytes(causal(SHAPE, torch.bfloat16, True), Sharding(2, 2, ZeroSettings())) == 0


def test_a_shift_takes_as_long_as_its_slowest_rank() -> None:
    """Both ways at once: rank 0 takes in 60 + 40 elements, rank 1 sends 20 + 50."""
    counts = [np.array(each) for each in ([0, 0], [100, 0], [40, 0], [0, 70], [0, 50])]
    assert shift_seconds(Traffic(*counts), 2, within=10, between=2) == pytest.approx(20 * 2 / 10 + 50 * 2 / 2)
    assert shift_seconds(Traffic(*counts), 2, within=1, between=10) == pytest.approx(60 * 2 / 1 + 40 * 2 / 10)


@pytest.mark.parametrize(
    ("held", "keep_weights", "records", "kept"),
    [
        (KEPT_CACHE_BYTES, True, True, True),
        (KEPT_CACHE_BYTES + 1, True, True, False),
        (1, False, True, False),
        (1, True, False, False),
    ],
)
def test_the_cache_is_kept_for_recordings_while_it_is_small(
    held: int, keep_weights: bool, records: bool, kept: bool
) -> None:
    assert cache_is_kept(held, keep_weights, records) == kept
