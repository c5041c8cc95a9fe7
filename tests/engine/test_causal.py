"""Causal LMs under ZeRO-3: log-probs and exact KL against `transformers`' own logits."""

from pathlib import Path

import pytest
import torch

from gearshift.engine import CausalModel, Rollouts, World
from tests.models import FAMILIES, save_tiny
from tests.worker_group import WorkerGroup


def rollouts(seed: int = 0) -> Rollouts:
    """Ten ragged rows; one of them without a response token."""
    rows, prompt, response = 10, 5, 7
    generator = torch.Generator().manual_seed(seed)
    row = torch.arange(rows)
    mask = torch.arange(response) < torch.arange(rows)[:, None] * 7 % 8
    return Rollouts(
        tokens=torch.randint(3, 131, (rows, prompt), generator=generator),
        lengths=torch.randint(1, prompt + 1, (rows,), generator=generator),
        ids=row,
        draws=row,
        samples=row * 0,
        responses=torch.randint(3, 131, (rows, response), generator=generator),
        logprobs=torch.zeros(rows, response),
        mask=mask,
        finished=row > 0,
    )


def own_log_softmax(folder: str, batch: Rollouts, temperature: float) -> list[torch.Tensor]:
    """Of each row's response positions `[tokens, V]`, by `transformers` alone, in fp64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).double()
    found = []
    for b in range(len(batch)):
        prompt, response = batch.tokens[b, : batch.lengths[b]], batch.responses[b][batch.mask[b]]
        with torch.no_grad():
            logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        found.append(torch.log_softmax(logits[: len(response)] / temperature, -1))
    return found


def logprobs_of(world: World, folder: str, batch: Rollouts, temperature: float) -> torch.Tensor:
    model = CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=3)
    return model.logprobs(batch.select(world.share(len(batch))), temperature)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_log_probs_are_those_of_the_models_own_logits(two_ranks: WorkerGroup, tmp_path: Path, family: str) -> None:
    """Families with a head bias (phi), a logit scale (cohere, granite) and a soft-cap (gemma2) among them."""
    folder, batch = str(save_tiny(family, tmp_path / family)), rollouts()
    found = torch.cat(two_ranks.run(logprobs_of, folder, batch, 0.8))
    for b, logp in enumerate(own_log_softmax(folder, batch, 0.8)):
        want = logp.gather(1, batch.responses[b][batch.mask[b]][:, None])[:, 0]
        torch.testing.assert_close(found[b][batch.mask[b]].double(), want, rtol=0, atol=2e-5)
        assert not found[b][~batch.mask[b]].any()


def held_against(world: World, folder: str, reference: str, batch: Rollouts) -> tuple[torch.Tensor, ...]:
    policy, other = (CausalModel.load(f, world, dtype=torch.float32, micro_batch_size=3) for f in (folder, reference))
    mine = batch.select(world.share(len(batch)))
    parameters = [*policy.module.parameters(), *other.module.parameters()]
    before = [parameter.ds_tensor.clone() for parameter in parameters]
    found = policy.against(other, mine, 0.8)
    assert all(torch.equal(p.ds_tensor, shard) for p, shard in zip(parameters, before, strict=True))
    return found


@pytest.mark.parametrize(("family", "reference"), [("llama", "qwen2"), ("gemma2", "phi"), ("cohere", "llama")])
def test_the_exact_kl_is_that_of_the_whole_distributions(
    two_ranks: WorkerGroup, tmp_path: Path, family: str, reference: str
) -> None:
    """Of different architectures even: only the vocabulary is common."""
    folders = [str(save_tiny(f, tmp_path / f, seed)) for seed, f in enumerate((family, reference))]
    batch = rollouts()
    ranks = two_ranks.run(held_against, *folders, batch)
    logprobs, ref_logprobs, kl = (torch.cat(parts) for parts in zip(*ranks, strict=True))
    ours, theirs = (own_log_softmax(folder, batch, 0.8) for folder in folders)
    for b, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        keep, tokens = batch.mask[b], batch.responses[b][batch.mask[b]][:, None]
        torch.testing.assert_close(kl[b][keep].double(), (p.exp() * (p - q)).sum(1), rtol=0, atol=2e-5)
        torch.testing.assert_close(logprobs[b][keep].double(), p.gather(1, tokens)[:, 0], rtol=0, atol=2e-5)
        torch.testing.assert_close(ref_logprobs[b][keep].double(), q.gather(1, tokens)[:, 0], rtol=0, atol=2e-5)
        assert not kl[b][~keep].any()
    assert kl.max() > 0.1
