"""A sequence-classification model under ZeRO-3 that scores whole texts the way its own family reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from gearshift.engine.batches import Rows
from gearshift.engine.distributed import World
from gearshift.engine.heads import bind_value_head
from gearshift.engine.loading import load_module
from gearshift.engine.zero import ZeroModel
from gearshift.errors import SettingError, UserError


@dataclass(frozen=True)
class Texts(Rows):
    """`tokens [B, S]` int64, right-padded; `lengths [B]` int64; `kinds [B, S]` int64: 1 in the second text of a pair
    (what some encoders call `token_type_ids`), else 0."""

    tokens: Tensor
    lengths: Tensor
    kinds: Tensor

    @property
    def sizes(self) -> Tensor:
        return self.lengths


class Classifier(ZeroModel):
    """A frozen classifier with one output, of any family: `score` of texts in its own tokens.

    `causal`: decoders (Llama, GPT-2 ...) have a linear `score` on each position, which is read at the text's last
    token, found by its length; no pad token is guessed. Encoders (BERT, DeBERTa ...) go through their own forward.
    """

    causal: bool

    @classmethod
    def load(
        cls,
        init: str,
        world: World,
        *,
        dtype: torch.dtype,
        micro_batch_size: int,
        micro_batch_tokens: int | None = None,
        deepspeed_extra: dict[str, Any] | None = None,
    ) -> Self:
        """From a folder or hub name. Raises SettingError, naming reward.init, for a model with several outputs."""
        from transformers import AutoModelForSequenceClassification

        module = load_module(
            AutoModelForSequenceClassification, init, world, dtype, deepspeed_extra=deepspeed_extra, frozen=True
        )
        if module.config.num_labels != 1:
            raise SettingError(
                "reward.init", f"{init} has {module.config.num_labels} outputs; a reward model has 1 (num_labels: 1)"
            )
        causal = isinstance(getattr(module, "score", None), nn.Linear)
        if causal:
            bind_value_head(module)
        model = cls(
            module,
            world,
            training=None,
            micro_batch_size=micro_batch_size,
            micro_batch_tokens=micro_batch_tokens,
            deepspeed_extra=deepspeed_extra,
        )
        model.causal = causal
        return model

    @property
    def positions(self) -> int | None:
        """The most tokens that a text may have; None where the config sets no bound."""
        config = self.config.get_text_config()
        found = getattr(config, "max_position_embeddings", None)
        if found is None:
            return None
        # RoBERTa's positions start behind the pad token's.
        offset = int(config.pad_token_id or 0) + 1 if "roberta" in config.model_type else 0
        return int(found) - offset

    def score(self, texts: Texts) -> Tensor:
        """Scores [B] fp32 of this rank's texts, `config.reward_bias` (0 when absent) subtracted. Collective.

        Raises UserError for a text that the model has no positions for.
        """
        longest, most = int(self.world.max(int(texts.lengths.max()))), self.positions
        if most is not None and longest > most:
            raise UserError(
                f"reward.init: prompt and response are {longest} tokens of the reward model's, which has {most} "
                "positions: lower data.max_prompt_tokens or rollout.max_new_tokens"
            )
        return self.map(self._causal if self.causal else self._own, texts, ends=self.causal)

    @property
    def packs(self) -> bool:
        """Encoders read their texts padded."""
        return self.causal and self._keeps_apart

    def hidden_states(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Of a decoder: the values at every position."""
        values: Tensor = self.engine(tokens, positions)
        return values

    def _causal(self, texts: Texts) -> Tensor:
        width, ends = int(texts.lengths.max()), texts.lengths[:, None] - 1
        rows = self.rows(texts.lengths, width)
        with self.apart(rows, torch.arange(width, device=ends.device) == ends):
            values = rows.spread(self.hidden_states(rows.join(texts.tokens[:, :width]), rows.positions))
        return values.gather(1, ends)[:, 0]

    def _own(self, texts: Texts) -> Tensor:
        columns = torch.arange(int(texts.lengths.max()), device=texts.tokens.device)
        mask = (columns < texts.lengths[:, None]).long()
        inputs = {"input_ids": texts.tokens[:, : len(columns)], "attention_mask": mask}
        if bool(getattr(self.config, "type_vocab_size", 0)):
            inputs["token_type_ids"] = texts.kinds[:, : len(columns)]
        logits: Tensor = self.engine(**inputs).logits
        return logits[:, 0].float() - float(getattr(self.config, "reward_bias", 0.0))
