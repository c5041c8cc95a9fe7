"""A sequence-classification model under ZeRO-3: scores of whole responses, values at every token."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from gearshift.engine.batches import Rollouts, join_responses
from gearshift.engine.distributed import World
from gearshift.engine.heads import bind_value_head, value_head_of
from gearshift.engine.loading import config_of, load_module
from gearshift.engine.zero import Training, ZeroModel


class RewardModel(ZeroModel):
    """A sequence-classification model with one output: values at every position, a score at a row's last token.

    Used as the reward model (frozen, or trained on comparisons) and as the critic.
    """

    @classmethod
    def load(
        cls,
        init: str,
        world: World,
        *,
        dtype: torch.dtype,
        micro_batch_size: int,
        micro_batch_tokens: int | None = None,
        training: Training | None = None,
        new_head: bool = False,
        seed: int = 0,
        deepspeed_extra: dict[str, Any] | None = None,
    ) -> Self:
        """From a sequence-classification folder; with `new_head` from a causal LM's backbone.

        The new head's weights are drawn from N(0, 1/(H+1)) (Stiennon et al. 2009.01325, code).
        """
        from transformers import AutoModelForSequenceClassification

        config = None
        if new_head:
            config = config_of(init, num_labels=1)
            config.problem_type = "regression"
            config.reward_bias = 0.0
        module = load_module(
            AutoModelForSequenceClassification,
            init,
            world,
            dtype,
            config=config,
            may_be_missing=_value_head_names if new_head else lambda module: [],
            seed=seed,
            deepspeed_extra=deepspeed_extra,
            frozen=training is None and not new_head,  # a new head is drawn into its weights
        )
        if new_head:
            _draw_value_head(module, world, seed)
        bind_value_head(module)
        return cls(
            module,
            world,
            training=training,
            micro_batch_size=micro_batch_size,
            micro_batch_tokens=micro_batch_tokens,
            deepspeed_extra=deepspeed_extra,
        )

    @property
    def bias(self) -> float:
        """Subtracted from every value, so that the demonstrations score 0 on average."""
        return float(getattr(self.config, "reward_bias", 0.0))

    @bias.setter
    def bias(self, value: float) -> None:
        self.config.reward_bias = float(value)

    def hidden_states(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """The values themselves."""
        values: Tensor = self.engine(tokens, positions)
        return values

    def forward(self, tokens: Tensor, lengths: Tensor | None = None, asked: Tensor | None = None) -> Tensor:
        """tokens [B, S] -> values [B, S] fp32, the bias subtracted; differentiable.

        `lengths [B]`: tokens of each row that have to be computed, to be packed where the model packs; None: all.
        `asked [B, S]` bool: values elsewhere may be anything; None: all are asked for.
        """
        rows = self.rows(lengths, tokens.shape[1])
        with rows.apart() if asked is None else self.apart(rows, asked):
            return rows.spread(self.hidden_states(rows.join(tokens), rows.positions))

    def values_at(self, positions: Tensor, tokens: Tensor, lengths: Tensor, mask: Tensor | None = None) -> Tensor:
        """`forward` at `positions [B, L]` -> values [B, L]; where `mask [B, L]` is False they may be anything."""
        counts = torch.ones_like(positions) if mask is None else mask.long()
        asked = torch.zeros_like(tokens).scatter_add(1, positions, counts) > 0
        return self.forward(tokens, lengths, asked).gather(1, positions)

    def response_values(self, rollouts: Rollouts) -> Tensor:
        """Values [B, L] fp32, read at the position before each response token (0 where masked); differentiable."""
        tokens, positions = join_responses(rollouts)
        return self.values_at(positions, tokens, rollouts.sizes, rollouts.mask) * rollouts.mask

    def values(self, rollouts: Rollouts) -> Tensor:
        """`response_values` of this rank's rows, without gradients. Collective."""
        return self.map(self.response_values, rollouts)

    def score(self, rollouts: Rollouts) -> Tensor:
        """Scores [B] fp32, read at the last response token (at the prompt's last token for an empty response)."""

        def last(micro: Rollouts) -> Tensor:
            tokens, _ = join_responses(micro)
            return self.values_at(micro.sizes[:, None] - 1, tokens, micro.sizes)[:, 0]

        return self.map(last, rollouts, ends=True)


def _value_head_names(module: nn.Module) -> list[str]:
    head = value_head_of(module)
    return [name for name, p in module.named_parameters() if any(p is own for own in head.parameters())]


def _draw_value_head(module: nn.Module, world: World, seed: int) -> None:
    import deepspeed

    head = value_head_of(module)
    with deepspeed.zero.GatheredParameters(list(head.parameters()), modifier_rank=0), torch.no_grad():
        if world.is_main:
            generator = torch.Generator().manual_seed(seed)
            draw = torch.randn(head.weight.shape, generator=generator) * (head.in_features + 1) ** -0.5
            head.weight.copy_(draw)
            if head.bias is not None:
                head.bias.zero_()
