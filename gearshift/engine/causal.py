"""A causal LM under ZeRO-3: log-probs of given tokens."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor, nn

from gearshift.engine.adapters import adapters_off
from gearshift.engine.batches import Rollouts, response_targets
from gearshift.engine.counting import count_pass
from gearshift.engine.distributed import World
from gearshift.engine.dropout import ResidualDropout
from gearshift.engine.heads import LogitTransform, Reference, bind_logprob_head, check_head, lm_head_of
from gearshift.engine.loading import load_module
from gearshift.engine.packing import Packed, Padded
from gearshift.engine.settings import LoraSettings
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
        micro_batch_tokens: int | None = None,
        training: Training | None = None,
        config: Any = None,
        seed: int = 0,
        deepspeed_extra: dict[str, Any] | None = None,
        lora: LoraSettings | None = None,
        residual_dropout: float = 0.0,
        **more: Any,
    ) -> Self:
        """From a causal-LM folder or hub name, or from nothing with `init` "config" and a `transformers` config.

        With `lora` the model is frozen and adapters beside its Linear layers train. `residual_dropout`: the rate, drawn
        from `seed`, in `accumulate` alone.
        """
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
            lora=lora,
            frozen=training is None,
        )
        bind_logprob_head(module)
        # Before DeepSpeed adds its own hooks, which then see what this one gives.
        dropping = ResidualDropout(module, residual_dropout, seed, world) if residual_dropout else None
        model = cls(
            module,
            world,
            training=training,
            micro_batch_size=micro_batch_size,
            micro_batch_tokens=micro_batch_tokens,
            deepspeed_extra=deepspeed_extra,
            **more,
        )
        model.dropout = dropping
        return model

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        entropy: bool = False,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """tokens, targets [B, S] -> log-probs [B, S] fp32 of the targets (0 where -100), entropy [B, S] or None.

        `lengths [B]`: tokens of each row that have to be computed, to be packed where the model packs; None: all.
        """
        rows = self.rows(lengths, tokens.shape[1])
        with self.apart(rows, targets != -100):
            result = self.engine(
                rows.join(tokens),
                targets=rows.join(targets),
                temperature=temperature,
                entropy=entropy,
                positions=rows.positions,
            )
        return rows.spread(result[0]), rows.spread(result[1]) if entropy else None

    def response_logprobs(
        self, rollouts: Rollouts, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs [B, L] fp32 of the response tokens (0 where masked), and the entropy there; differentiable."""
        tokens, targets, positions = response_targets(rollouts)
        logprobs, entropies = self.forward(tokens, targets, temperature, entropy, rollouts.sizes)

        def at_responses(values: Tensor) -> Tensor:
            return values.gather(1, positions) * rollouts.mask

        return at_responses(logprobs), None if entropies is None else at_responses(entropies)

    def logprobs(self, rollouts: Rollouts, temperature: float = 1.0) -> Tensor:
        """Log-probs [B, L] fp32 of this rank's responses, without gradients. Collective."""
        return self.map(lambda micro: self.response_logprobs(micro, temperature)[0], rollouts)

    def without_adapters(self) -> WithoutAdapters:
        """The model that the adapters were added to: a reference that needs no second copy."""
        return WithoutAdapters(self)

    def hidden_states(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """tokens [B, S] -> last hidden states [B, S, H]; `positions [B, S]`: of a packed row."""
        hidden: Tensor = self.engine(tokens, hidden_states=True, positions=positions)
        return hidden

    def against(
        self, reference: CausalModel | WithoutAdapters, rollouts: Rollouts, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, the reference's log-probs, and the exact KL to it at each response token: [B, L] fp32 each.

        The KL is over the whole vocabulary, of the two distributions that a token was (or would have been) drawn
        from. Neither model's logits are ever built; no gradients. Collective: the reference's head is gathered beside
        this model's own. A reference that serves here must not be asked for `logprobs` in between: DeepSpeed would take
        its backbone's forward for the start of that, and fetch the head by itself.
        """
        head = lm_head_of(reference.module)
        both_pack = self.packs and reference.packs

        def compare(micro: Rollouts) -> Tensor:
            tokens, targets, positions = response_targets(micro)
            rows, asked = self.rows(micro.sizes if both_pack else None, tokens.shape[1]), targets != -100
            tokens, targets = rows.join(tokens), rows.join(targets)
            with reference.apart(rows, asked):
                hidden = reference.hidden_states(tokens, rows.positions)
            with reference.weights_of(head), self.apart(rows, asked):
                held_against = Reference(hidden, head.weight, head.bias, LogitTransform.of(reference.config))
                found = self.engine(
                    tokens,
                    targets=targets,
                    temperature=temperature,
                    reference=held_against,
                    positions=rows.positions,
                )
            spread = (rows.spread(values) for values in found)
            return torch.stack([values.gather(1, positions) * micro.mask for values in spread], dim=-1)

        count_pass(reference.module, rollouts)
        with reference.placed():
            logprobs, ref_logprobs, kl = self.map(compare, rollouts).unbind(-1)
        return logprobs, ref_logprobs, kl


class WithoutAdapters:
    """A causal LM with its adapters off, for as long as each call takes; see `CausalModel.without_adapters`."""

    def __init__(self, model: CausalModel):
        self._model, self.module, self.config = model, model.module, model.config

    def logprobs(self, rollouts: Rollouts, temperature: float = 1.0) -> Tensor:
        """As `CausalModel.logprobs`."""
        with adapters_off(self.module):
            return self._model.logprobs(rollouts, temperature)

    @property
    def packs(self) -> bool:
        """As `CausalModel.packs`."""
        return self._model.packs

    def placed(self) -> AbstractContextManager[None]:
        """As `CausalModel.placed`."""
        return self._model.placed()

    def apart(self, rows: Packed | Padded, asked: Tensor) -> AbstractContextManager[None]:
        """As `CausalModel.apart`."""
        return self._model.apart(rows, asked)

    def weights_of(self, module: nn.Module) -> AbstractContextManager[None]:
        """As `CausalModel.weights_of`."""
        return self._model.weights_of(module)

    def hidden_states(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """As `CausalModel.hidden_states`, without gradients."""
        with adapters_off(self.module), torch.no_grad():
            return self._model.hidden_states(tokens, positions)
