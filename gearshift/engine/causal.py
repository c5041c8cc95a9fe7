"""A causal LM under ZeRO-3: log-probs of given tokens."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from gearshift.engine.batches import Rollouts, join_responses
from gearshift.engine.distributed import World
from gearshift.engine.heads import bind_logprob_head, check_head
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
        tokens, positions = join_responses(rollouts)
        # Masked tokens all point at position 0, where a real one may stand: writing them elsewhere keeps it.
        targets = torch.full((len(tokens), tokens.shape[1] + 1), -100, dtype=torch.int64, device=tokens.device)
        spot = torch.where(rollouts.mask, positions, tokens.shape[1])
        targets.scatter_(1, spot, rollouts.responses)
        logprobs, entropies = self.forward(tokens, targets[:, :-1], temperature, entropy)
        keep = rollouts.mask

        def at_responses(values: Tensor) -> Tensor:
            return values.gather(1, positions) * keep

        return at_responses(logprobs), None if entropies is None else at_responses(entropies)

    def logprobs(self, rollouts: Rollouts, temperature: float = 1.0) -> Tensor:
        """Log-probs [B, L] fp32 of this rank's responses, without gradients. Collective."""
        return self.map(lambda micro: self.response_logprobs(micro, temperature)[0], rollouts)
