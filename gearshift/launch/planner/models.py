"""The models of a PPO run without their weights: built from a config.json on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gearshift.engine.adapters import add_adapters, train_adapters_only
from gearshift.engine.fused import bind_fused
from gearshift.engine.heads import bind_logprob_head, bind_value_head
from gearshift.engine.linears import bind_linears
from gearshift.engine.loading import build_on_meta, config_of, dropout_rates
from gearshift.engine.settings import LoraSettings
from gearshift.engine.zero import compute_activations_again
from gearshift.errors import SettingError
from gearshift.launch.planner.tracing import META, Timeline, extended, trace

GPU = torch.device("cuda")  # which need not be there


@dataclass(frozen=True)
class Batch:
    """A micro-batch: rows of `width` tokens each, `targets` of which have a log-prob asked for."""

    rows: int
    width: int
    targets: int


class PaperModel:
    """A model that is `trained` or frozen, of a run on `device`. `module`: on the meta device, its head bound as in a
    run."""

    def __init__(self, module: Any, trained: bool, entropy: bool = False, device: torch.device = GPU):
        self.module, self.trained, self._entropy = module, trained, entropy
        module.requires_grad_(trained)
        if trained and hasattr(module, "lora"):
            train_adapters_only(module)
        if trained:
            bind_linears(module)
        bind_fused(module, device)
        self._timelines: dict[tuple[Batch, bool, bool], Timeline] = {}

    @cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(dict.fromkeys(self.module.parameters()))

    @property
    def total(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def timeline(self, batch: Batch, train: bool, again: bool = False) -> Timeline:
        """Of one micro-batch, with its backward pass if it is to `train`; `again`: which computes activations again. Of
        many rows it is worked out from that of two and that of three, since every tensor grows with the rows in a
        straight line."""
        key = batch, train, again
        if key not in self._timelines:
            two, three = (replace(batch, rows=rows) for rows in (2, 3))
            found = None
            if batch.rows > 3:
                found = extended(self.timeline(two, train, again), self.timeline(three, train, again), batch.rows)
            self._timelines[key] = found or self._trace(batch, train, again)
        return self._timelines[key]

    def _trace(self, batch: Batch, train: bool, again: bool) -> Timeline:
        if again:
            compute_activations_again(self.module)
        self.module.train(again)  # outside of training mode transformers computes nothing again; nothing is dropped
        tokens = torch.zeros(batch.rows, batch.width, dtype=torch.int64, device=META)
        return trace(self.module, self._forward(tokens, train), train, batch.rows * batch.targets)

    def _forward(self, tokens: Tensor, train: bool) -> Callable[[], Any]:
        if getattr(self.module, "is_causal_lm", False):
            return lambda: self.module(tokens, targets=tokens, entropy=self._entropy and train)
        return lambda: self.module(tokens)


def causal(
    config: Any, dtype: torch.dtype, trained: bool, lora: LoraSettings | None = None, device: torch.device = GPU
) -> PaperModel:
    from transformers import AutoModelForCausalLM

    module = build_on_meta(AutoModelForCausalLM, _plain(config), dtype)
    if lora is not None:
        add_adapters(module, lora, 0)
    module.to(META)
    bind_logprob_head(module)
    module.is_causal_lm = True
    return PaperModel(module, trained, entropy=True, device=device)


def classifier(config: Any, dtype: torch.dtype, trained: bool, device: torch.device = GPU) -> PaperModel:
    """Values at every position, whatever kind of model the config is of."""
    from transformers import AutoModelForSequenceClassification

    config = _plain(config)
    config.num_labels = 1
    module = build_on_meta(AutoModelForSequenceClassification, config, dtype).to(META)
    bind_value_head(module)
    return PaperModel(module, trained, device=device)


def _plain(config: Any) -> Any:
    config = copy.deepcopy(config)
    for name in dropout_rates(config):
        setattr(config, name, 0.0)
    return config


def shape_of(field: str, init: str, given: str | None) -> Any:
    """The `transformers` config of a model that the config's `field` names, or of the folder (or config.json) that is
    `given` in its place. Raises SettingError: there is none here."""
    name = given or init
    path = Path(name)
    if path.name == "config.json":
        path = path.parent
    if not (path / "config.json").is_file():
        raise SettingError(
            field,
            f"the plan needs the shape of {name}, and there is no {name}/config.json here: give a folder that has one, "
            f"--model {field.split('.')[0]}=FOLDER (weights are not needed)",
        )
    return config_of(str(path))
