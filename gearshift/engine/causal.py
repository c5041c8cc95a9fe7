"""A causal LM under ZeRO-3: log-probs of given tokens."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from gearshift.engine.batches import Rollouts, response_targets
from gearshift.engine.distributed import World
from gearshift.engine.heads import LogitTransform, Reference, bind_logprob_head, check_head, lm_head_of
from gearshift.engine.loading import load_module
from gearshift.engine.zero import Training, ZeroModel


class CausalModel(ZeroModel):
    """A causal LM: log-probs of given tokens, without the [tokens, vocabulary] logits."""

    @classmethod
    def load(
        cls,
        init: str,
        world: World,
        *,
        dtype: torch.dtype,
        micro_batch_size: int,
        training: Training | None = None,
        config: Any = None,
        seed: int = 0,
        deepspeed_extra: dict[str, Any] | None = None,
        **more: Any,
    ) -> Self:
        """From a causal-LM folder or hub name, or from nothing with `init` "config" and a `transformers` config."""
        from transformers import AutoModelForCausalLM

        module = load_module(
            AutoModelForCausalLM,
            init,
            world,
            dtype,
            config=config,
            head_check=lambda model: check_head(model, init),
            seed=seed,
            deepspeed_extra=deepspeed_extra,
        )
        bind_logprob_head(module)
        return cls(
            module,
            world,
            training=training,
            micro_batch_size=micro_batch_size,
            deepspeed_extra=deepspeed_extra,
            **more,
        )

    def forward(
        self, tokens: Tensor, targets: Tensor, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """tokens, targets [B, S] -> log-probs [B, S] fp32 of the targets (0 where -100), entropy [B, S] or None."""
        result = self.engine(tokens, targets=targets, temperature=temperature, entropy=entropy)
        return result[0], result[1] if entropy else None

    def response_logprobs(
        self, rollouts: Rollouts, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs [B, L] fp32 of the response tokens (0 where masked), and the entropy there; differentiable."""
        tokens, targets, positions = response_targets(rollouts)
        logprobs, entropies = self.forward(tokens, targets, temperature, entropy)

        def at_responses(values: Tensor) -> Tensor:
            return values.gather(1, positions) * rollouts.mask

        return at_responses(logprobs), None if entropies is None else at_responses(entropies)

    def logprobs(self, rollouts: Rollouts, temperature: float = 1.0) -> Tensor:
        """Log-probs [B, L] fp32 of this rank's responses, without gradients. Collective."""
        return self.map(lambda micro: self.response_logprobs(micro, temperature)[0], rollouts)

    def against(
        self, reference: CausalModel, rollouts: Rollouts, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, the reference's log-probs, and the exact KL to it at each response token: [B, L] fp32 each.

        The KL is over the whole vocabulary, of the two distributions that a token was (or would have been) drawn
        from. Neither model's logits are ever built; no gradients. Collective: the reference's head is gathered beside
        this model's own.
        """
        import deepspeed

        head = lm_head_of(reference.module)

        def compare(micro: Rollouts) -> Tensor:
            tokens, targets, positions = response_targets(micro)
            hidden = reference.engine(tokens, hidden_states=True)
            with deepspeed.zero.GatheredParameters(list(head.parameters())):
                held_against = Reference(hidden, head.weight, head.bias, LogitTransform.of(reference.config))
                found = self.engine(tokens, targets=targets, temperature=temperature, reference=held_against)
            return torch.stack([values.gather(1, positions) * micro.mask for values in found], dim=-1)

        logprobs, ref_logprobs, kl = self.map(compare, rollouts).unbind(-1)
        return logprobs, ref_logprobs, kl
