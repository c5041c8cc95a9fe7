"""Rollouts of every family of models against `transformers` on the same weights, on four ranks: TP 2 twice, and TP 4.

All are tiny and random. Prompts and answers are longer than the sliding windows.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.engine import HybridEngine, Prompts, Sampling, World
from gearshift.engine.sampling import logits_of
from tests.models import FAMILIES, MORE_FAMILIES, save_tiny
from tests.worker_group import WorkerGroup

NEW_TOKENS = 32
# Of logits up to about 10, in fp32: sums in another order. They were 2e-6 at most.
BOUND = 1e-5

# Their attention is eager in transformers, with a cap or sinks: rows are padded.
PADDED = {"gemma2", "gpt_oss"}
TWO_HOSTS = {"llama", "gemma2", "mixtral", "gpt2"}


def prompts() -> Prompts:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 9, 9, 1])
    tokens = torch.randint(3, 131, (4, 9), generator=generator) * (torch.arange(9) < lengths[:, None])
    ids = torch.arange(4)
    return Prompts(tokens, lengths, ids, ids, torch.zeros_like(ids))


def roll_out(world: World, folder: str, tp_size: int, hosts: int) -> dict[str, Any]:
    """This rank's greedy answers, the replica's logits of one of them, the gap to the training forward; saves again.

    `hosts`: as if on so many. A group of both has gloo's sums, and no recorded steps.
    """
    ranks = world.size // hosts
    world = dataclasses.replace(world, local_rank=world.rank % ranks, local_size=ranks)
    policy = HybridEngine.load(folder, world, dtype=torch.float32, micro_batch_size=4, tp_size=tp_size)
    mine = prompts().select(world.share(4))
    with policy.rollout() as generator:
        rollouts = generator.generate(mine, Sampling(NEW_TOKENS, eos_ids=(), temperature=0.0))
        # The ranks of a group look at the same row: their forward is one.
        row = prompts().select(slice(1, 2)).tokens
        logits = replica_logits(policy, row)
    gap = (policy.logprobs(rollouts) - rollouts.logprobs).abs().max().item()
    if tp_size == 2:
        policy.save_pretrained(f"{folder}/again")
    assert policy._replica is not None
    part = policy._replica.layout.vocabulary[policy.group.rank]
    return {
        "tokens": rollouts.responses,
        "logprobs": rollouts.logprobs,
        "gap": gap,
        "logits": logits,
        "part": part,
        "packs": policy.packs,
    }


@torch.no_grad()
def replica_logits(policy: HybridEngine, tokens: Tensor) -> Tensor:
    """tokens [1, T] -> this rank's part of the logits [T, V_r]."""
    replica = policy._replica
    assert replica is not None
    replica.cache.reset(1, tokens.shape[1])
    replica.cache.begin_prefill(torch.zeros(1, dtype=torch.int64))
    hidden = replica.hidden(tokens, torch.arange(tokens.shape[1])[None])
    return logits_of(hidden[0], replica.head)


@torch.no_grad()
def own_answers(model: Any) -> tuple[Tensor, Tensor, float]:
    """`transformers`' greedy answers [4, 32], their log-probs, and the least margin over the next best token."""
    tokens, logprobs, margin = [], [], float("inf")
    for row, length in zip(prompts().tokens, prompts().lengths, strict=True):
        whole = model.generate(row[None, :length], do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None,
                               pad_token_id=0)  # fmt: skip
        answer = whole[0, length:]
        own = torch.log_softmax(model(whole).logits[0, length - 1 : -1], -1)
        tokens.append(answer)
        logprobs.append(own.gather(1, answer[:, None])[:, 0])
        best = own.topk(2).values
        margin = min(margin, (best[:, 0] - best[:, 1]).min().item())
    return torch.stack(tokens), torch.stack(logprobs), margin


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_rollouts_are_those_of_transformers(four_ranks: WorkerGroup, tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_tiny(family, tmp_path, seed=4)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, logprobs, margin = own_answers(model)
    assert margin > 2 * BOUND, "a near-tie: rounding may decide"
    assert len(set(tokens.flatten().tolist())) > 3, "a row that repeats one token tells little"
    with torch.no_grad():
        logits = model(prompts().tokens[1:2]).logits[0]
    for tp_size in (2, 4):
        ranks = four_ranks.run(roll_out, str(folder), tp_size, 2 if family in TWO_HOSTS else 1)
        assert torch.equal(torch.cat([found["tokens"] for found in ranks]), tokens)
        torch.testing.assert_close(torch.cat([found["logprobs"] for found in ranks]), logprobs, atol=BOUND, rtol=0)
        for found in ranks:
            assert found["gap"] <= BOUND
            assert found["packs"] == (family not in PADDED), "the training forward"
            torch.testing.assert_close(found["logits"], logits[:, slice(*found["part"])], atol=BOUND, rtol=0)
    again = AutoModelForCausalLM.from_pretrained(f"{folder}/again", dtype=torch.float32).state_dict()
    own = model.state_dict()
    assert again.keys() == own.keys()
    assert all(torch.equal(again[name], own[name]) for name in own)
