"""Bytes of live tensors, counted while operations run, and timelines of models without weights."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.llama import modeling_llama

from gearshift.kernels import linear_logprob
from gearshift.launch.planner.live import LiveBytes
from gearshift.launch.planner.models import Batch, causal
from gearshift.launch.planner.passes import Sharding, need
from gearshift.launch.planner.tracing import META, Timeline, extended, trace
from gearshift.launch.planner.window import ZeroSettings


def test_a_storage_counts_once_and_until_nothing_refers_to_it() -> None:
    with LiveBytes() as live:
        x = torch.zeros(100)
        view = x.view(10, 10)
        del x
        assert live.bytes == 400
        del view
        assert (live.bytes, live.peak) == (0, 400)


def test_a_resized_storage_counts_with_its_new_size() -> None:
    own = torch.UntypedStorage.resize_
    with LiveBytes() as live:
        x = torch.zeros(100)
        x.untyped_storage().resize_(0)
        assert live.bytes == 0
        x.untyped_storage().resize_(800)
        assert live.bytes == 800
    assert torch.UntypedStorage.resize_ is own


def test_what_an_operator_of_ours_needs_inside_counts() -> None:
    hidden, weight, targets = torch.randn(8, 4), torch.randn(50, 4), torch.zeros(8, dtype=torch.int64)
    with LiveBytes() as live:
        linear_logprob(hidden, weight, targets)
        assert live.peak >= 8 * 50 * 4  # the logits


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).to(META)


def timeline(rows: int, train: bool = True) -> Timeline:
    own = model()
    return trace(own, lambda: own(torch.zeros(rows, 16, device=META)), train)


def real_peak(rows: int) -> int:
    """The same passes with weights, their gradients dropped as they come."""
    own = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    for p in own.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with LiveBytes() as live:
        live.ignore(*own.parameters())
        y = own(torch.zeros(rows, 16))
        torch.stack([y.sum()]).sum().backward()
    return live.peak


def test_without_weights_the_peak_is_what_it_is_with_them() -> None:
    for rows in (2, 7, 64):
        assert timeline(rows).activations == real_peak(rows)


def test_what_is_ignored_does_not_count_from_then_on() -> None:
    with LiveBytes() as live:
        before, other = torch.zeros(100), torch.zeros(10)
        live.ignore(before)
        live.ignore(before)
        live.reset_peak()
        assert live.bytes == live.peak == other.nbytes
        del before
        assert live.bytes == other.nbytes


def test_many_rows_follow_from_two_and_three() -> None:
    found = extended(timeline(2), timeline(3), 50)
    assert found is not None
    assert found.events == timeline(50).events


def test_a_forward_pass_alone_keeps_nothing() -> None:
    assert timeline(64, train=False).activations < timeline(64).activations


def test_layers_that_run_again_keep_their_inputs_alone() -> None:
    """And a pass that keeps all is not changed by one before it that does not."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    shape = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 64, **heads}
    batch, model = Batch(2, 128, 16), causal(AutoConfig.for_model("llama", **shape), torch.float32, True)
    again, kept = (model.timeline(batch, True, way) for way in (True, False))
    assert again.forward == kept.forward
    assert sum(event.kind == "fetch" for event in again.events) > sum(event.kind == "fetch" for event in kept.events)
    assert {e.value for e in again.events if e.kind == "gradient"} == {
        e.value for e in kept.events if e.kind == "gradient"
    }
    inputs, layer = 6 * 2 * 128 * 64 * 4, kept.activations // 6
    assert inputs < again.activations < inputs + 2 * layer
    assert again.activations < kept.activations / 2
    fresh = causal(AutoConfig.for_model("llama", **shape), torch.float32, True)
    assert fresh.timeline(batch, True).events == kept.events


def test_gradients_wait_in_the_bucket_and_are_joined_when_it_is_full() -> None:
    """Of 8, 256, 32 and, too large for the small bucket, 512 numbers."""
    roomy, tight = (
        need(timeline(2), Sharding(1, 4, ZeroSettings(reduce_bucket=bucket))).gradients for bucket in (10_000, 300)
    )
    assert roomy == (512 + 32 + 256 + 8) * 4
    assert tight == (8 + 256 + 32) * 4


def test_on_processors_activations_are_those_of_the_operations_that_run_there() -> None:
    """In one pass, SwiGLU keeps two tensors in place of three, and a norm its input alone."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    shape = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 64, **heads}
    batch, config = Batch(2, 128, 16), AutoConfig.for_model("llama", **shape)
    own = modeling_llama.apply_rotary_pos_emb
    gpu = causal(config, torch.float32, True).timeline(batch, True)
    half = causal(config, torch.bfloat16, True, device=torch.device("cpu"))
    try:
        cpu = causal(config, torch.float32, True, device=torch.device("cpu")).timeline(batch, True)
    finally:
        modeling_llama.apply_rotary_pos_emb = own
    saved = 2 * 128 * 4 * (512 + 64)  # of the last layer, at its backward: the products, and what the norm turned
    assert gpu.activations - cpu.activations >= 2 * saved
    assert not any("forward" in vars(layer.mlp) for layer in half.module.model.layers)
