"""The reward model and the critic that is copied from it: one and the same before the first update."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gearshift.engine import RewardModel, Rollouts, Training, World
from gearshift.engine.batches import join_responses
from gearshift.kernels import value_loss
from gearshift.launch import folders
from tests.models import save_tiny
from tests.rlhf.tiny import VOCABULARY, save_reward_model
from tests.worker_group import WorkerGroup

ROWS, BIAS = 6, 0.375


def rollouts(rows: int = ROWS, seed: int = 0) -> Rollouts:
    """Prompts of 1 to 5 tokens with responses of 0 to 6, pad and EOS ids among them."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (rows,), generator=g)
    mask = torch.arange(6) < torch.randint(1, 7, (rows, 1), generator=g)
    mask[0] = False
    row = torch.arange(rows)
    tokens = torch.randint(0, VOCABULARY, (rows, 5), generator=g) * (torch.arange(5) < lengths[:, None])
    responses = torch.randint(0, VOCABULARY, (rows, 6), generator=g) * mask
    return Rollouts(tokens, lengths, row, row, row * 0, responses, -1.0 * mask, mask, row > 0)


def load(world: World, folder: str, training: Training | None = None, micro: int = 2) -> RewardModel:
    return RewardModel.load(folder, world, dtype=torch.float32, micro_batch_size=micro, training=training)


def critic_and_reward(world: World, folder: str, again: str) -> dict[str, Tensor]:
    """What both say before the first update, what the critic says after one, and what it says once saved and loaded."""
    # A model that trains takes two of its micro-batches at once where it does not.
    reward_model, critic = load(world, folder), load(world, folder, Training(learning_rate=1e-2), micro=1)
    mine = rollouts().select(world.share(ROWS))
    tokens, _ = join_responses(mine)
    found = {
        "reward": reward_model.map(lambda micro: reward_model.forward(micro.responses), mine),
        "critic": critic.map(lambda micro: critic.forward(micro.responses), mine),
        "scores": reward_model.score(mine),
        "reward_values": reward_model.values(mine),
        "critic_values": critic.values(mine),
    }
    with torch.no_grad():
        found["everywhere"] = critic.forward(tokens)
    critic.save_pretrained(again)
    found["again"] = load(world, again).values(mine)
    critic.accumulate(_to_five, mine)
    critic.step()
    found["updated"] = critic.values(mine)
    return found


def _to_five(critic: RewardModel, micro: Rollouts, count: Tensor) -> Any:
    values = critic.response_values(micro)
    return value_loss(values, values.detach(), torch.full_like(values, 5.0), micro.mask, tokens=count)


def test_they_agree_at_every_position_before_the_first_update(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "reward", bias=BIAS)
    ranks = two_ranks.run(critic_and_reward, str(folder), str(tmp_path / "critic"))
    for rank, found in enumerate(ranks):
        world = World(rank, 2, rank, 2, torch.device("cpu"))
        mine = rollouts().select(world.share(ROWS))
        assert found["reward"].shape == (3, 6)
        assert torch.equal(found["reward"], found["critic"])
        assert torch.equal(found["reward_values"], found["critic_values"])
        assert torch.equal(found["again"], found["critic_values"])
        assert (found["updated"] - found["critic_values"]).abs().max() > 1e-3
        assert (found["critic_values"][~mine.mask] == 0).all()
        check_positions(mine, found["everywhere"], found["critic_values"], found["scores"])


def check_positions(mine: Rollouts, everywhere: Tensor, values: Tensor, scores: Tensor) -> None:
    """A value is read before its token, the score at the last one; `everywhere` are the values at all positions."""
    for b, (prompt, response) in enumerate(zip(mine.lengths.tolist(), mine.mask.sum(1).tolist(), strict=True)):
        before = everywhere[b, prompt - 1 : prompt - 1 + response]
        torch.testing.assert_close(values[b, :response], before, atol=1e-5, rtol=0)
        assert abs(scores[b] - everywhere[b, prompt + response - 1]) < 1e-5


def scores_and_values(world: World, folder: str, micro: int) -> tuple[Tensor, Tensor]:
    """In one micro-batch: to the rounding of products of more rows, since a score asks for its own token alone."""
    model = load(world, folder, micro=micro)
    mine = rollouts().select(world.share(ROWS))
    tokens, _ = join_responses(mine)
    with torch.no_grad():
        everywhere = model.forward(tokens, mine.sizes)
    last = mine.lengths + mine.mask.sum(1) - 1
    return model.score(mine), everywhere.gather(1, last[:, None])[:, 0]


def test_the_score_is_the_value_at_the_last_token(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "reward")
    for scores, values in two_ranks.run(scores_and_values, str(folder), 8):
        torch.testing.assert_close(scores, values, atol=1e-6, rtol=0)


def test_the_score_is_the_classifiers_minus_the_bias(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    """`transformers` scores a row's last token that is not pad; its head has no bias."""
    from transformers import AutoModelForSequenceClassification

    folder = save_reward_model(tmp_path / "reward", bias=BIAS)
    found = torch.cat([scores for scores, _ in two_ranks.run(scores_and_values, str(folder), 2)])
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    every = rollouts()
    compared = 0
    for b in range(ROWS):
        row = torch.cat([every.tokens[b, : every.lengths[b]], every.responses[b][every.mask[b]]])
        if row[-1] == model.config.pad_token_id:
            continue
        with torch.no_grad():
            logit = model(row[None]).logits[0, 0]
        assert abs(float(logit) - BIAS - float(found[b])) < 1e-5
        compared += 1
    assert compared >= ROWS - 1


def new_head(world: World, folder: str, out: str, seed: int) -> tuple[Tensor, float]:
    from gearshift.engine.saving import gathered_parameters

    model = RewardModel.load(folder, world, dtype=torch.float32, micro_batch_size=2, new_head=True, seed=seed)
    before = model.bias
    model.bias = -1.25
    model.save_pretrained(out)
    assert load(world, out).bias == -1.25
    return dict(gathered_parameters(model.module))["score.weight"], before


def test_a_new_head_and_its_bias(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    """Drawn from N(0, 1/(H+1)) by the seed alone; the bias survives saving; the folder is that of a classifier."""
    hidden = 1024
    small = {"num_attention_heads": 4, "head_dim": 4, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    folder = save_tiny("llama", tmp_path / "llama", hidden_size=hidden, **small)
    out = tmp_path / "reward"
    (head, before), (head_1, _) = two_ranks.run(new_head, str(folder), str(out), 3)
    assert before == 0.0
    assert torch.equal(head, head_1)
    assert head.shape == (1, hidden)
    # The standard deviation of 1,024 draws is within 7% of its value (3 standard errors).
    assert abs(float(head.std()) * (hidden + 1) ** 0.5 - 1) < 0.07
    other = two_ranks.run(new_head, str(folder), str(tmp_path / "other"), 4)[0][0]
    assert not torch.equal(head, other)
    assert folders.model_problem(str(out), classifier=True) is None
    assert (folders.model_config(str(out)) or {})["reward_bias"] == -1.25


def unequal(world: World, folder: str, counts: list[int]) -> tuple[Tensor, Tensor]:
    model = load(world, folder, micro=2)
    mine = rollouts(sum(counts)).select(slice(sum(counts[: world.rank]), sum(counts[: world.rank + 1])))
    return model.values(mine), model.score(mine)


def test_ranks_with_unequal_micro_batches(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    """Two rows on one rank and three on the other, in micro-batches of 2: the rank with fewer takes part in all."""
    folder = str(save_reward_model(tmp_path / "reward"))
    even = two_ranks.run(unequal, folder, [3, 3])
    values, scores = (torch.cat([part[i] for part in even]) for i in range(2))
    uneven = two_ranks.run(unequal, folder, [1, 5], timeout=60)
    assert [len(part[1]) for part in uneven] == [1, 5]
    torch.testing.assert_close(torch.cat([part[0] for part in uneven]), values, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat([part[1] for part in uneven]), scores, atol=1e-5, rtol=0)
