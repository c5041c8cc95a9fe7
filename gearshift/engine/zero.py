"""A model as a DeepSpeed ZeRO-3 engine: load, forward, accumulate, step, save.

A loss is a sum over terms divided by the global number of terms of the minibatch, over all ranks and micro-batches:
neither the micro-batch size nor the number of ranks changes the loss or its gradient. DeepSpeed averages over ranks
and over accumulation steps; that averaging is undone in one place, `ZeroModel.accumulate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from gearshift.engine.batches import Rollouts, Rows, join_responses
from gearshift.engine.distributed import World
from gearshift.engine.heads import bind_logprob_head, bind_value_head, check_head, value_head_of
from gearshift.engine.loading import build_on_meta, materialise
from gearshift.engine.saving import save_pretrained
from gearshift.errors import UserError
from gearshift.kernels import Loss

R = TypeVar("R", bound=Rows)
LossFunction = Callable[["Any", "Any", Tensor], Loss]
Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Training:
    """How a model's weights move. `learning_rate` is multiplied by `schedule(step)`; `max_grad_norm` 0: no clipping."""

    learning_rate: float
    optimizer: str = "adamw"  # adamw | sgd
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: Schedule = field(default=lambda step: 1.0)


def zero3_config(world: World, dtype: torch.dtype, training: Training | None, extra: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's config. What `extra` (the `deepspeed:` section) says is merged over it, section by section."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world.size,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False, "overlap_comm": world.device.type != "cpu"},
        # Gradients add up and travel in fp32 whatever the weights are (bf16 loses them at many micro-batches).
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": training.max_grad_norm if training else 0.0,
        "zero_allow_untested_optimizer": True,
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
    return _merged(config, extra)


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def _optimizer(training: Training, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    return torch.optim.AdamW(
        parameters,
        lr=training.learning_rate,
        betas=training.betas,
        eps=training.eps,
        weight_decay=training.weight_decay,
    )


def _without_dropout(config: Any) -> None:
    """Set every dropout rate of a `transformers` config to 0, so that two forwards of the same tokens agree."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and (name.endswith(("dropout", "pdrop")) or "dropout_prob" in name):
            setattr(config, name, 0.0)


class ZeroModel:
    """A `transformers` model whose weights, gradients and optimizer state are cut over all ranks (ZeRO-3).

    Built by the class methods of `CausalModel` and `RewardModel`. Without `training` it is frozen.
    """

    def __init__(
        self,
        module: Any,
        world: World,
        *,
        training: Training | None,
        micro_batch_size: int,
        deepspeed_extra: dict[str, Any] | None = None,
    ):
        import deepspeed

        self.world, self.module, self.training = world, module, training
        self.micro_batch_size = micro_batch_size
        self.steps = 0  # optimizer steps taken: the stamp of the weights
        module.requires_grad_(training is not None)
        trained = [p for p in module.parameters() if p.requires_grad]
        schedule = training.schedule if training else None
        self.engine = deepspeed.initialize(
            model=module,
            model_parameters=trained or None,
            optimizer=_optimizer(training, trained) if training else None,
            lr_scheduler=(lambda o: torch.optim.lr_scheduler.LambdaLR(o, schedule)) if schedule else None,
            config=zero3_config(world, self.dtype, training, deepspeed_extra or {}),
        )[0]
        if training:
            # Every micro-batch is reduced as it comes, so that no caller need know which one is the last.
            self.engine.set_gradient_accumulation_boundary(True)

    @property
    def config(self) -> Any:
        return self.module.config

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.module.parameters()).dtype
        return dtype

    @property
    def learning_rate(self) -> float:
        """The rate that the next step uses."""
        return float(self.engine.get_lr()[0])

    @property
    def parameters_total(self) -> int:
        return sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in self.module.parameters())

    def accumulate(self, loss: LossFunction, batch: Rows, weight: float = 1.0) -> dict[str, Tensor]:
        """Add the gradient of `weight · loss(batch)` to what the next `step` applies. Collective.

        `loss(model, micro_batch, count)` returns a `Loss` whose value is a sum of terms divided by `count`, the
        global `loss_count` of the batch. Returns the loss (under "loss") and its metrics, summed over micro-batches
        and ranks. A loss that no rank has terms for is 0.
        """
        count = self.world.sum(batch.loss_count.detach().to(self.world.device, torch.float64))
        sums: dict[str, Tensor] = {}
        for micro, real in self._micro_batches(batch):
            result = loss(self, micro, count.clamp(min=1.0).float())
            # ZeRO-3 averages over ranks: times the world size gives the sum. A repeated micro-batch (a rank with
            # fewer rows than others takes part in their collectives) adds nothing.
            self.engine.backward(result.loss * (weight * self.world.size * real))
            for name, value in {"loss": result.loss, **result.metrics}.items():
                sums[name] = sums.get(name, 0) + value.detach().double() * real
        return self._summed(sums)

    @torch.no_grad()
    def evaluate(self, loss: LossFunction, batch: Rows) -> dict[str, Tensor]:
        """What `accumulate` returns, without gradients."""
        count = self.world.sum(batch.loss_count.detach().to(self.world.device, torch.float64))
        sums: dict[str, Tensor] = {}
        for micro, real in self._micro_batches(batch):
            result = loss(self, micro, count.clamp(min=1.0).float())
            for name, value in {"loss": result.loss, **result.metrics}.items():
                sums[name] = sums.get(name, 0) + value.double() * real
        return self._summed(sums)

    def step(self) -> float:
        """One optimizer step with the gradients accumulated since the last; returns their norm before clipping."""
        if self.training is None:
            raise RuntimeError("this model is frozen: it was built without `training`")
        self.engine.step()
        self.steps += 1
        return float(self.engine.get_global_grad_norm() or 0.0)

    @torch.no_grad()
    def map(self, function: Callable[[Any], Tensor], batch: R) -> Tensor:
        """`function(micro_batch)` over all micro-batches of this rank's rows, joined, without gradients. Collective."""
        parts = [function(micro) for micro, real in self._micro_batches(batch) if real]
        return torch.cat(parts) if parts else torch.empty(0, device=self.world.device)

    def save_pretrained(self, folder: Path | str, tokenizer: Any = None) -> None:
        """Write a folder that `from_pretrained` loads, streamed from the shards. Collective."""
        save_pretrained(self.module, Path(folder), self.world, tokenizer=tokenizer)

    def _micro_batches(self, batch: R) -> Iterator[tuple[R, int]]:
        """At most `micro_batch_size` rows at a time, as often on every rank: `(piece, 1)`, or `(repeat, 0)` to fill."""
        rows, size = len(batch), self.micro_batch_size
        own = -(-rows // size)
        for i in range(int(self.world.max(own))):
            if i < own:
                yield batch.select(slice(i * size, (i + 1) * size)).to(self.world.device), 1
            elif rows:
                yield batch.select(slice(0, 1)).to(self.world.device), 0
            else:
                raise ValueError("a rank without any row cannot take part in a ZeRO-3 forward")

    def _summed(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        if not sums:
            return {}
        names = sorted(sums)
        packed = self.world.sum(torch.stack([sums[n].to(self.world.device) for n in names]))
        return {n: v.cpu() for n, v in zip(names, packed, strict=True)}


def load_module(
    auto_class: Any,
    init: str,
    world: World,
    dtype: torch.dtype,
    *,
    config: Any = None,
    may_be_missing: Callable[[nn.Module], list[str]] = lambda module: [],
    seed: int = 0,
    deepspeed_extra: dict[str, Any] | None = None,
) -> nn.Module:
    """A ZeRO-3-cut `transformers` module from a folder or hub name, or (with `init` "config") from nothing.

    Collective. Dropout is off in every model. Raises UserError for missing or misshapen weights.
    """
    from transformers import AutoConfig

    folder = None
    with world.main_first():
        folder = None if init == "config" else resolve_folder(init, world)
    if config is None:
        config = AutoConfig.from_pretrained(str(folder))
    _without_dropout(config)
    module = build_on_meta(auto_class, config, dtype)
    offload = (deepspeed_extra or {}).get("zero_optimization", {}).get("offload_param")
    materialise(module, world, folder=folder, may_be_missing=may_be_missing(module), seed=seed, offload=offload)
    return module


def resolve_folder(init: str, world: World) -> Path:
    """A local folder as it is, a hub name downloaded once per host. Raises UserError when neither is there."""
    if Path(init).is_dir():
        return Path(init)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(init, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:
        raise UserError(f"{init}: neither a folder nor a model that the hub gives ({error})") from error


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
            AutoModelForCausalLM, init, world, dtype, config=config, seed=seed, deepspeed_extra=deepspeed_extra
        )
        bind_logprob_head(module)
        model = cls(
            module,
            world,
            training=training,
            micro_batch_size=micro_batch_size,
            deepspeed_extra=deepspeed_extra,
            **more,
        )
        model.check_head(init)
        return model

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

    @torch.no_grad()
    def check_head(self, name: str) -> None:
        """Hold the fused head against the model's own logits on a few tokens. Collective."""
        vocabulary = self.config.get_text_config().vocab_size
        tokens = torch.arange(1, 17, device=self.world.device).reshape(2, 8) * 7919 % vocabulary
        targets = tokens.roll(-1, 1)
        logits = self.engine(tokens, use_cache=False).logits
        check_head(logits, self.forward(tokens, targets)[0], targets, name)


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
        training: Training | None = None,
        new_head: bool = False,
        seed: int = 0,
        deepspeed_extra: dict[str, Any] | None = None,
    ) -> Self:
        """From a sequence-classification folder; with `new_head` from a causal LM's backbone.

        The new head's weights are drawn from N(0, 1/(H+1)) (Stiennon et al. 2009.01325, code).
        """
        from transformers import AutoConfig, AutoModelForSequenceClassification

        config = None
        if new_head:
            config = AutoConfig.from_pretrained(init, num_labels=1)
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
        )
        if new_head:
            _draw_value_head(module, world, seed)
        bind_value_head(module)
        return cls(module, world, training=training, micro_batch_size=micro_batch_size, deepspeed_extra=deepspeed_extra)

    @property
    def bias(self) -> float:
        """Subtracted from every value, so that the demonstrations score 0 on average."""
        return float(getattr(self.config, "reward_bias", 0.0))

    @bias.setter
    def bias(self, value: float) -> None:
        self.config.reward_bias = float(value)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] -> values [B, S] fp32, the bias subtracted; differentiable."""
        values: Tensor = self.engine(tokens)
        return values

    def response_values(self, rollouts: Rollouts) -> Tensor:
        """Values [B, L] fp32, read at the position before each response token (0 where masked); differentiable."""
        tokens, positions = join_responses(rollouts)
        return self.forward(tokens).gather(1, positions) * rollouts.mask

    def values(self, rollouts: Rollouts) -> Tensor:
        """`response_values` of this rank's rows, without gradients. Collective."""
        return self.map(self.response_values, rollouts)

    def score(self, rollouts: Rollouts) -> Tensor:
        """Scores [B] fp32, read at the last response token (at the prompt's last token for an empty response)."""

        def last(micro: Rollouts) -> Tensor:
            tokens, _ = join_responses(micro)
            end = micro.lengths + micro.mask.sum(1) - 1
            return self.forward(tokens).gather(1, end[:, None])[:, 0]

        return self.map(last, rollouts)


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
