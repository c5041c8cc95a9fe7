"""Given tokens through the rollout model, whose head is split over the vocabulary: log-probs, and the KL to another.

Letters: B rows, L response length, S longest sequence, H hidden.

Every function is collective over the replica's tensor-parallel group, whose ranks pass the same rollouts. Nothing is
written to the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gearshift.engine.batches import Rollouts, response_targets
from gearshift.engine.replica import Replica
from gearshift.kernels import linear_kl, linear_logprob


def response_logprobs(replica: Replica, rollouts: Rollouts, temperature: float, most_tokens: int) -> Tensor:
    """[B, L] fp32, 0 where masked; forwards of at most `most_tokens`, padding included, or of one row."""
    head = replica.head

    def score(tokens: Tensor, targets: Tensor) -> Tensor:
        return linear_logprob(
            _hidden(replica, tokens),
            head.weight,
            targets,
            bias=head.bias,
            scale=head.transform.scale,
            softcap=head.transform.softcap,
            temperature=temperature,
            group=replica.group.group,
            vocab_start=head.vocab_start,
        ).logprobs[:, None]

    return _at_responses(score, 1, rollouts, most_tokens)[..., 0]


def response_kl(
    replica: Replica, reference: Replica, rollouts: Rollouts, temperature: float, most_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, the reference's, and the exact KL to it: [B, L] fp32 each, 0 where masked.

    Raises ValueError when the two do not split one vocabulary alike.
    """
    head, other = replica.head, reference.head
    if (head.vocab_start, len(head.weight)) != (other.vocab_start, len(other.weight)):
        raise ValueError("both models must have the same vocabulary and the same tensor-parallel size")

    def score(tokens: Tensor, targets: Tensor) -> Tensor:
        found = linear_kl(
            _hidden(replica, tokens),
            head.weight,
            _hidden(reference, tokens),
            other.weight,
            targets,
            bias=head.bias,
            scale=head.transform.scale,
            softcap=head.transform.softcap,
            ref_bias=other.bias,
            ref_scale=other.transform.scale,
            ref_softcap=other.transform.softcap,
            temperature=temperature,
            group=replica.group.group,
            vocab_start=head.vocab_start,
        )
        assert found.logprobs is not None
        assert found.ref_logprobs is not None
        return torch.stack([found.logprobs, found.ref_logprobs, found.kl], dim=-1)

    logprobs, ref_logprobs, kl = _at_responses(score, 3, rollouts, most_tokens).unbind(-1)
    return logprobs, ref_logprobs, kl


def _hidden(replica: Replica, tokens: Tensor) -> Tensor:
    """tokens [B, S] -> [B · S, H]."""
    replica.cache.begin_scoring()
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return replica.hidden(tokens, positions).flatten(0, 1)


def _at_responses(
    score: Callable[[Tensor, Tensor], Tensor], numbers: int, rollouts: Rollouts, most_tokens: int
) -> Tensor:
    """`score(tokens [b, S], targets [b · S])` -> [b · S, numbers] of some rows at a time, as [B, L, numbers]."""
    found = torch.zeros(*rollouts.responses.shape, numbers, device=rollouts.tokens.device)
    for rows in _micro_batches(rollouts, most_tokens):
        micro = rollouts.select(rows)
        tokens, targets, positions = response_targets(micro)
        scored = score(tokens, targets.flatten()).view(*tokens.shape, numbers)
        picked = scored.gather(1, positions[..., None].expand(-1, -1, numbers))
        found[rows] = picked * micro.mask[..., None]
    return found


def _micro_batches(rollouts: Rollouts, most_tokens: int) -> Iterator[Tensor]:
    """Row numbers; rows of like length together, the longest first."""
    lengths = rollouts.lengths + rollouts.mask.sum(1)
    waiting = lengths.argsort(descending=True, stable=True)
    while len(waiting):
        count = max(1, most_tokens // max(1, int(lengths[waiting[0]])))
        yield waiting[:count]
        waiting = waiting[count:]
