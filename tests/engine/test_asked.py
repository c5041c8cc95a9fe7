"""The last feed-forward, left out for tokens of which nothing is asked: the same results, and who cannot."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from gearshift.engine import CausalModel, RewardModel, TokenBatch, Training, World, asked
from gearshift.kernels import Loss
from gearshift.rlhf.language import language_loss
from tests.engine.test_packing import LENGTHS, PADDED, SOME, batch
from tests.models import save_tiny
from tests.rlhf.test_reward import distance
from tests.worker_group import WorkerGroup

# Their last layer's feed-forward is another kind of layers, or experts.
WHOLE = {"gpt2", "opt", "mixtral", "deepseek_v3"}


def responses() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets of the last third of each row, of one row none, and lengths."""
    tokens, targets, lengths = batch(LENGTHS)
    columns = torch.arange(tokens.shape[1])
    targets = torch.where(columns >= 2 * lengths[:, None] // 3, targets, -100)
    targets[4] = -100
    return tokens, targets, lengths


class Counted:
    """How many tokens a module was given, in all calls."""

    def __init__(self, module: nn.Module):
        self.tokens = 0
        own = module.forward

        def forward(x: Tensor) -> Tensor:
            self.tokens += x.shape[:-1].numel()
            found: Tensor = own(x)
            return found

        module.forward = forward  # type: ignore[method-assign]


def last_projection(model: CausalModel | RewardModel) -> Counted | None:
    module = asked.last_feed_forward(model.module)
    return None if module is None else Counted([m for m in module.modules() if isinstance(m, nn.Linear)][-1])


def families(world: World, folders: dict[str, str]) -> dict[str, tuple[bool, int, float]]:
    """Whether each leaves out what is not asked for; the tokens that its last product had then; by how much its
    log-probs are off from those of all tokens."""
    found = {}
    tokens, targets, lengths = responses()
    for name, folder in folders.items():
        model = CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=1)
        skips = model.packs and model._skips
        counted = last_projection(model)
        with torch.no_grad():
            some, entropy = model.forward(tokens, targets, 0.7, True, lengths)
            seen = 0 if counted is None else counted.tokens
            model._skips = False
            whole, right = model.forward(tokens, targets, 0.7, True, lengths)
        assert entropy is not None
        assert right is not None
        found[name] = (skips, seen, float(torch.stack([some - whole, entropy - right]).abs().max()))
    return found


def test_log_probs_are_the_same(one_rank: WorkerGroup, tmp_path: Path) -> None:
    """Also where a norm follows the feed-forward, or attention stands beside it."""
    names = {*SOME, "olmo2", "phi", "cohere"}
    found = one_rank.run(families, {name: str(save_tiny(name, tmp_path / name)) for name in names})[0]
    assert {name for name, (skips, *_) in found.items() if not skips} == WHOLE | PADDED
    targets = int((responses()[1] != -100).sum())
    assert {seen for skips, seen, _ in found.values() if skips} == {targets}
    assert max(gap for *_, gap in found.values()) <= 2e-5


def gradients_of(world: World, folder: str, skips: bool, again: bool) -> tuple[float, dict[str, Tensor], int]:
    from deepspeed.utils import safe_get_full_grad

    training = Training(learning_rate=0.1, optimizer="sgd", max_grad_norm=0.0, gradient_checkpointing=again)
    model = CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=4, training=training)
    assert model.packs
    if not skips:
        model._skips = False
    assert model._skips == skips
    counted = last_projection(model)
    assert counted is not None
    tokens, targets, _ = responses()
    sums = model.accumulate(language_loss, TokenBatch(tokens, targets).select(slice(world.rank, None, world.size)))
    gradients = {name: safe_get_full_grad(p).clone() for name, p in model.module.named_parameters()}
    return float(sums["loss"]), gradients, counted.tokens


def test_gradients_are_the_same(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    """Of activations that are kept; those that are computed again are so as a whole."""
    folder = str(save_tiny("llama", tmp_path / "llama"))
    (loss, right, every), (some, found, few), (whole, again, twice) = (
        two_ranks.run(gradients_of, folder, *how)[0] for how in ((False, False), (True, False), (True, True))
    )
    assert few < every // 2
    assert twice >= every
    assert some == pytest.approx(loss, rel=1e-6)
    assert whole == pytest.approx(loss, rel=1e-6)
    assert distance(found, right) <= 1e-5
    assert distance(again, right) <= 1e-5


def values_at_ends(world: World, folder: str) -> tuple[Tensor, Tensor, int]:
    model = RewardModel.load(folder, world, dtype=torch.float32, micro_batch_size=1, new_head=True)
    assert model.packs
    assert model._skips
    tokens, _, lengths = batch(LENGTHS)
    positions = torch.stack([lengths - 1, lengths // 2, torch.zeros_like(lengths)], 1)
    mask = torch.tensor([True, True, False]).expand_as(positions)
    counted = last_projection(model)
    assert counted is not None
    with torch.no_grad():
        found = model.values_at(positions, tokens, lengths, mask)
        seen = counted.tokens
        return found[:, :2], model.forward(tokens, lengths).gather(1, positions)[:, :2], seen


def test_values_are_the_same(one_rank: WorkerGroup, tmp_path: Path) -> None:
    found, right, seen = one_rank.run(values_at_ends, str(save_tiny("llama", tmp_path / "llama")))[0]
    assert (found - right).abs().max() <= 1e-6
    assert seen == 2 * len(LENGTHS) - 1  # a row of one token has but one place


def of_another_layer(world: World, folder: str) -> tuple[bool, Tensor, Tensor]:
    """As if the first layer's feed-forward were the last: what others see of it would be gone."""
    with patch.object(asked, "last_feed_forward", lambda model: model.base_model.layers[0].mlp):
        model = CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=1)
        assert model.packs
        skips = model._skips
    tokens, targets, lengths = responses()
    with torch.no_grad():
        found = model.forward(tokens, targets, lengths=lengths)[0]
        return skips, found, model.forward(tokens, targets)[0]


def test_a_model_that_is_found_to_mix_tokens_computes_all(one_rank: WorkerGroup, tmp_path: Path) -> None:
    skips, found, right = one_rank.run(of_another_layer, str(save_tiny("llama", tmp_path / "llama")))[0]
    assert not skips
    assert (found - right).abs().max() <= 2e-5


def dropped(world: World, folder: str, evaluates: bool) -> dict[str, Tensor]:
    """The gradient of a first loss with dropout, with or without another forward before it."""
    from deepspeed.utils import safe_get_full_grad

    training = Training(learning_rate=0.1, optimizer="sgd", max_grad_norm=0.0)
    model = CausalModel.load(
        folder, world, dtype=torch.float32, micro_batch_size=8, training=training, residual_dropout=0.2
    )
    tokens, targets, _ = responses()
    rows = TokenBatch(tokens, targets)
    if evaluates:
        model.evaluate(language_loss, rows)
    model.accumulate(language_loss, rows)
    assert model._skips
    return {name: safe_get_full_grad(p).clone() for name, p in model.module.named_parameters()}


def test_finding_out_draws_no_dropout(one_rank: WorkerGroup, tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama"))
    at_once, later = (one_rank.run(dropped, folder, evaluates)[0] for evaluates in (False, True))
    assert all(torch.equal(at_once[name], later[name]) for name in later)


def nothing_asked(world: World, folder: str) -> float:
    model = CausalModel.load(
        folder, world, dtype=torch.float32, micro_batch_size=8, training=Training(learning_rate=0.1)
    )
    tokens, _, _ = responses()

    def loss(model: CausalModel, micro: TokenBatch, count: Tensor) -> Loss:
        logprobs, _ = model.forward(micro.tokens, micro.targets, lengths=micro.sizes)
        return Loss(-logprobs.sum() / count, {})

    return float(model.accumulate(loss, TokenBatch(tokens, torch.full_like(tokens, -100)))["loss"])


def test_rows_of_which_nothing_is_asked(one_rank: WorkerGroup, tmp_path: Path) -> None:
    assert one_rank.run(nothing_asked, str(save_tiny("llama", tmp_path / "llama"))) == [0.0]
