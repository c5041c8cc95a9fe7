"""What flows between the floors: batches of rows that can be cut into micro-batches.

Letters: B rows, P longest prompt, L longest response, S longest sequence.
Everything is right-padded. Masks and lengths travel with the tokens, so that none is ever guessed from a pad token.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A batch whose every field is a tensor with the rows in its first dimension."""

    def __len__(self) -> int:
        return len(getattr(self, dataclasses.fields(self)[0].name))

    def select(self, rows: Tensor | slice) -> Self:
        """The given rows, in the given order."""
        return type(self)(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})

    def to(self, device: torch.device | str) -> Self:
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)})

    @property
    def sizes(self) -> Tensor:
        """[B] int64: tokens of each row that a forward has to compute, 1 or more."""
        raise NotImplementedError(f"{type(self).__name__} does not say how long its rows are")

    @property
    def loss_count(self) -> Tensor:
        """How many terms a mean loss over these rows has; summed over ranks before it divides."""
        raise NotImplementedError(f"{type(self).__name__} has no loss of its own")


@dataclass(frozen=True)
class TokenBatch(Rows):
    """Sequences for a language-model loss (pretraining, SFT).

    `tokens [B, S]`; `targets [B, S]`: the token that position s predicts, -100 where there is no loss.
    """

    tokens: Tensor
    targets: Tensor

    @property
    def sizes(self) -> Tensor:
        """Up to each row's last target: in a causal model nothing before it can see what follows."""
        columns = torch.arange(1, self.targets.shape[1] + 1, device=self.targets.device)
        return (columns * (self.targets != -100)).amax(1).clamp(min=1)

    @property
    def loss_count(self) -> Tensor:
        return (self.targets != -100).sum()


@dataclass(frozen=True)
class Prompts(Rows):
    """`tokens [B, P]`, `lengths [B]`, `ids [B]` (row in the data), `draws [B]` (which draw of the run),
    `samples [B]` (which answer to that draw). All int64."""

    tokens: Tensor
    lengths: Tensor
    ids: Tensor
    draws: Tensor
    samples: Tensor


@dataclass(frozen=True)
class Rollouts(Prompts):
    """The prompts' fields and what was sampled after them.

    `responses [B, L]` int64; `logprobs [B, L]` fp32, of the whole softmax(z / temperature);
    `mask [B, L]` bool, True on response tokens, EOS included; `finished [B]` bool, whether EOS or a stop string was
    reached.
    """

    responses: Tensor
    logprobs: Tensor
    mask: Tensor
    finished: Tensor

    @property
    def sizes(self) -> Tensor:
        return self.lengths + self.mask.sum(1)

    @property
    def loss_count(self) -> Tensor:
        return self.mask.sum()


@dataclass(frozen=True)
class Episodes(Rollouts):
    """Rollouts that were scored: everything that one PPO update reads.

    `ref_logprobs`, `values`, `rewards`, `kl`, `advantages`, `returns`, `weights` (of tokens in the policy loss: 1, or
    truncated importance weights) are `[B, L]` fp32, 0 where masked; `scores [B]` fp32, as the reward model gave them.
    """

    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor
    rewards: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor


def join_responses(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Prompt and response as one right-padded sequence.

    Returns `tokens [B, S]` (0 after the end) and `positions [B, L]`: the position *before* each response token,
    from which its log-prob and its value are read (0 where masked).
    """
    prompt_len = rollouts.lengths
    total = int(rollouts.sizes.max()) if len(rollouts) else 1
    device = rollouts.tokens.device
    tokens = torch.zeros(len(rollouts), total, dtype=torch.int64, device=device)
    columns = torch.arange(rollouts.tokens.shape[1], device=device)
    rows, cols = (columns < prompt_len[:, None]).nonzero(as_tuple=True)
    tokens[rows, cols] = rollouts.tokens[rows, cols]
    rows, cols = rollouts.mask.nonzero(as_tuple=True)
    tokens[rows, prompt_len[rows] + cols] = rollouts.responses[rows, cols]
    steps = torch.arange(rollouts.responses.shape[1], device=device)
    positions = (prompt_len[:, None] + steps - 1) * rollouts.mask
    return tokens, positions


def response_targets(rollouts: Rollouts) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and targets [B, S] (-100 outside the responses), and where each response token is predicted [B, L]."""
    tokens, positions = join_responses(rollouts)
    # Masked tokens all point at position 0, where a real one may stand: writing them elsewhere keeps it.
    targets = torch.full((len(tokens), tokens.shape[1] + 1), -100, dtype=torch.int64, device=tokens.device)
    targets.scatter_(1, torch.where(rollouts.mask, positions, tokens.shape[1]), rollouts.responses)
    return tokens, targets[:, :-1].contiguous(), positions
