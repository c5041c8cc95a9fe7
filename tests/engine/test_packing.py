"""Sequences that share a row: what packing does to tensors, and what models make of it against each sequence alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import CausalModel, RewardModel, TokenBatch, Training, World
from gearshift.engine.packing import Packed
from gearshift.kernels import native
from gearshift.rlhf.language import language_loss
from tests.models import SIZES, save_tiny
from tests.rlhf.test_reward import distance
from tests.worker_group import WorkerGroup

LENGTHS = [5, 24, 1, 24, 17, 5, 13]
# Their attention has a cap, or sinks, which SDPA has not: it is eager, and their rows are padded.
PADDED = {"gemma2", "gpt_oss"}
SOME = ["llama", "mistral", "gpt2", "opt", "gemma2", "gemma3_text", "cohere2", "mixtral", "deepseek_v3", "gpt_oss"]


def batch(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, their targets, and lengths; what stands behind a row's end is no padding but noise."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, SIZES["vocab_size"], (len(lengths), max(lengths) + 3), generator=generator)
    own = torch.tensor(lengths)
    columns = torch.arange(tokens.shape[1])
    return tokens, torch.where(columns < own[:, None], tokens.roll(-1, 1), -100), own


def test_what_is_joined_comes_back_to_its_place() -> None:
    tokens, _, lengths = batch(LENGTHS)
    packed = Packed(lengths, tokens.shape[1])
    joined = packed.join(tokens)
    assert joined.shape == (1, sum(LENGTHS))
    assert packed.sequences.lengths == sorted(LENGTHS, reverse=True)
    starts = (packed.positions[0] == 0).nonzero()[:, 0].tolist()
    assert starts == [0, 24, 48, 65, 78, 83, 88]
    assert list(packed.sequences.runs()) == [(2, 24), (1, 17), (1, 13), (2, 5), (1, 1)]
    real = torch.arange(tokens.shape[1]) < lengths[:, None]
    assert torch.equal(packed.spread(joined), torch.where(real, tokens, 0))
    pairs = packed.spread(torch.stack([joined, -joined], dim=-1))
    assert torch.equal(pairs[..., 1], -torch.where(real, tokens, 0))


# Its attention is the compiled one; other heads here are smaller than that takes.
LARGE_HEADS = {"head_dim": 16}


def families(world: World, folders: dict[str, str]) -> dict[str, tuple[bool, bool, float, float]]:
    """Whether each packs, and with the compiled attention; its log-probs packed against one row at a time; those
    crossed, by how much they differ."""
    found = {}
    tokens, targets, lengths = batch(LENGTHS)
    for name, folder in folders.items():
        model = CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=1)
        packs, calls = model.packs, list[str]()  # whether it packs is found out by forwards of its own
        with torch.no_grad():
            with native.noted(lambda name, call, calls=calls: calls.append(name)):
                packed, _ = model.forward(tokens, targets, lengths=lengths)
            rows = zip(tokens, targets, LENGTHS, strict=True)
            alone = [model.forward(row[None, :n], goal[None, :n])[0][0] for row, goal, n in rows]
            joined = Packed(lengths, tokens.shape[1])
            crossed = model.engine(joined.join(tokens), targets=joined.join(targets))[0]
        gaps = [float((row[: len(own)] - own).abs().max()) for row, own in zip(packed, alone, strict=True)]
        far = float((joined.spread(crossed) - packed).abs().max())
        found[name] = (packs, "causal_attention" in calls, max(gaps), far)
    return found


def test_packed_rows_give_what_each_gives_alone(one_rank: WorkerGroup, tmp_path: Path) -> None:
    """Windows shorter than the sequences, rotary and learned positions, experts. Every family: test_families.py."""
    folders = {name: str(save_tiny(name, tmp_path / name)) for name in SOME}
    folders["large heads"] = str(save_tiny("llama", tmp_path / "large", **LARGE_HEADS))
    found = one_rank.run(families, folders)[0]
    assert {name for name, (packs, *_) in found.items() if not packs} == PADDED
    assert {name for name, (_, compiled, *_) in found.items() if compiled} == {"large heads"}
    for name, (_, _, gap, far) in found.items():
        assert gap <= 2e-5, name
        assert far > 1e-2, f"{name}: what is compared does not depend on the other sequences"


def loss_and_gradient(
    world: World, folder: str, micro: int, again: bool = False
) -> tuple[float, dict[str, torch.Tensor], bool]:
    from deepspeed.utils import safe_get_full_grad

    training = Training(learning_rate=0.1, optimizer="sgd", max_grad_norm=0.0, gradient_checkpointing=again)
    model = CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=micro, training=training)
    tokens, targets, _ = batch(LENGTHS)
    sums = model.accumulate(language_loss, TokenBatch(tokens, targets).select(slice(world.rank, None, world.size)))
    gradients = {name: safe_get_full_grad(p).clone() for name, p in model.module.named_parameters()}
    model.step()
    return float(sums["loss"]), gradients, model.packs


@pytest.mark.parametrize("family", ["llama", "large heads", "gpt2", "gemma3_text", "gpt_oss"])
def test_the_loss_and_gradient_are_those_of_each_alone(two_ranks: WorkerGroup, tmp_path: Path, family: str) -> None:
    """Rotary positions, learned ones, a window shorter than the sequences, and one that is padded; activations kept,
    and computed again in the backward pass."""
    own = ("llama", LARGE_HEADS) if family == "large heads" else (family, {})
    folder = str(save_tiny(own[0], tmp_path / own[0], **own[1]))
    loss, gradients, _ = two_ranks.run(loss_and_gradient, folder, 1)[0]  # one row at a time: nothing is beside it
    for again in (False, True):
        together, found, packs = two_ranks.run(loss_and_gradient, folder, 4, again)[0]
        assert packs == (family not in PADDED)
        assert together == pytest.approx(loss, rel=1e-6)
        assert distance(found, gradients) <= 1e-5


def packs_without_positions(world: World, folder: str) -> bool:
    model = CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=1)
    backbone: Any = model.module.base_model
    own = backbone.forward
    backbone.forward = lambda input_ids, use_cache: own(input_ids=input_ids, use_cache=use_cache)
    return model.packs


def packs_with_a_mask_of_its_own(world: World, folder: str) -> bool:
    model = CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=1)
    for layer in model.module.base_model.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *given, own=own, **named: own(*given, **{**named, "attention_mask": None})
    return model.packs


@pytest.mark.parametrize("told", [packs_without_positions, packs_with_a_mask_of_its_own])
def test_a_model_that_would_not_keep_them_apart_is_padded(
    one_rank: WorkerGroup, tmp_path: Path, told: Callable[[World, str], bool]
) -> None:
    assert one_rank.run(told, str(save_tiny("llama", tmp_path / "llama"))) == [False]


def values_of(world: World, folder: str) -> tuple[bool, torch.Tensor, torch.Tensor]:
    model = RewardModel.load(folder, world, dtype=torch.float32, micro_batch_size=1, new_head=True)
    tokens, _, lengths = batch(LENGTHS)
    with torch.no_grad():
        alone = [model.forward(row[None, :n])[0] for row, n in zip(tokens, LENGTHS, strict=True)]
        return model.packs, model.forward(tokens, lengths), torch.nn.utils.rnn.pad_sequence(alone, batch_first=True)


def test_values_are_those_of_each_alone(one_rank: WorkerGroup, tmp_path: Path) -> None:
    packs, packed, alone = one_rank.run(values_of, str(save_tiny("llama", tmp_path / "llama")))[0]
    assert packs
    assert (packed[:, : max(LENGTHS)] - alone).abs().max() <= 1e-5


def micro_batches(world: World, folder: str) -> tuple[list[int], list[float], list[float]]:
    """Tokens of each micro-batch of at most 30; what `map` gives of each row, and what it should."""
    model = CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=1, micro_batch_tokens=30)
    tokens, targets, _ = batch(LENGTHS)
    seen: list[int] = []

    def first(micro: TokenBatch) -> torch.Tensor:
        seen.append(int(micro.sizes.sum()))
        return micro.tokens[:, 0].double()

    return seen, model.map(first, TokenBatch(tokens, targets)).tolist(), tokens[:, 0].double().tolist()


def test_micro_batches_are_bounded_by_tokens_and_rows_keep_their_order(one_rank: WorkerGroup, tmp_path: Path) -> None:
    seen, found, wanted = one_rank.run(micro_batches, str(save_tiny("llama", tmp_path / "llama")))[0]
    assert sum(seen) == sum(LENGTHS)
    assert max(seen) <= 30
    assert len(seen) < len(LENGTHS)
    assert found == wanted
