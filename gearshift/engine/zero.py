"""A model as a DeepSpeed ZeRO-3 engine: load, forward, accumulate, step, save.

A loss is a sum over terms divided by the global number of terms of the minibatch, over all ranks and micro-batches:
neither the micro-batch size nor the number of ranks changes the loss or its gradient. What of DeepSpeed averages over
ranks is undone in one place, `ZeroModel.accumulate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from gearshift.engine.adam import RowAdamW
from gearshift.engine.adapters import train_adapters_only
from gearshift.engine.asked import bind_asked, gives_what_is_asked
from gearshift.engine.average import WeightAverage
from gearshift.engine.balance import balanced, by_length, parts_needed
from gearshift.engine.batches import Rows
from gearshift.engine.counting import count_pass, count_step
from gearshift.engine.distributed import World
from gearshift.engine.dropout import ResidualDropout
from gearshift.engine.fused import bind_fused
from gearshift.engine.gradients import GradientSums
from gearshift.engine.linears import bind_linears
from gearshift.engine.packing import Packed, Padded, keeps_apart
from gearshift.engine.saving import save_pretrained
from gearshift.engine.siblings import bind_siblings
from gearshift.engine.spans import span
from gearshift.engine.whole import WholeWeights
from gearshift.errors import NotFinite, SettingError, UserError, one_line
from gearshift.kernels import Loss

if TYPE_CHECKING:
    from gearshift.engine.checkpoints.shards import Shards

R = TypeVar("R", bound=Rows)

ALL_WEIGHTS = 10**15  # elements of a parameter

# How many micro-batches of training a forward without a backward takes at once. A backward needs what a layer computes
# on the way and the gradients of all that beside every layer's input, even where activations are computed again.
ALONE = 2
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
    average: float | None = None  # decay of the moving average of the weights; None: none is kept
    gradient_checkpointing: bool = False  # activations are computed again in the backward pass


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
        "zero_force_ds_cpu_optimizer": False,
    }
    if world.size == 1 and not _weights_on_host(extra):
        # A whole weight is the shard itself, and need not come and go: for DeepSpeed all weights are small.
        config["zero_optimization"]["stage3_param_persistence_threshold"] = ALL_WEIGHTS
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
    return _merged(config, extra)


def _weights_on_host(extra: dict[str, Any]) -> bool:
    away = (extra.get("zero_optimization") or {}).get("offload_param") or {}
    return str(away.get("device", "none")) != "none"


def on_host(extra: dict[str, Any] | None) -> dict[str, Any]:
    """A `deepspeed:` section, and the weights lie in host memory until a layer asks for them."""
    return _merged(extra or {}, {"zero_optimization": {"offload_param": {"device": "cpu"}}})


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def _optimizer(training: Training, parameters: list[nn.Parameter], world: World) -> torch.optim.Optimizer:
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    kind = torch.optim.AdamW
    if world.size == 1 and world.device.type == "cpu":
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

        kind = RowAdamW
        if kind not in ZERO_SUPPORTED_OPTIMIZERS:
            ZERO_SUPPORTED_OPTIMIZERS.append(kind)  # what it tells of others that ZeRO has not been tried with
    return kind(
        parameters,
        lr=training.learning_rate,
        betas=training.betas,
        eps=training.eps,
        weight_decay=training.weight_decay,
        fused=True,  # one pass, without temporaries as large as the weights
    )


def compute_activations_again(module: Any) -> None:
    """Of every layer the backward pass keeps the input alone. Raises SettingError for a family that cannot."""
    # Newer versions of transformers have the first name, and warn of the second.
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise SettingError("optimizer.gradient_checkpointing", f"{one_line(error)}: leave it out") from error


def share_masters(optimizer: Any) -> None:
    """In fp32 DeepSpeed's master weights are a copy of the weights: here both are one."""
    pairs = zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
    for weights, masters in pairs:
        if weights is not None and (weights.dtype, weights.device) == (masters.dtype, masters.device):
            masters.data = weights


class ZeroModel:
    """A `transformers` model whose weights, gradients and optimizer state are cut over all ranks (ZeRO-3).

    See `CausalModel` and `RewardModel`. Without `training` it is frozen. `dropout`: what `accumulate` drops, if any.
    A forward takes at most `micro_batch_size` rows of a rank, or `micro_batch_tokens` tokens where that is given; in a
    model that trains, one that no backward follows takes `ALONE` times as many.
    """

    dropout: ResidualDropout | None = None
    _skips = False  # whether it leaves out what nobody asks for; known once `packs` is

    def __init__(
        self,
        module: Any,
        world: World,
        *,
        training: Training | None,
        micro_batch_size: int,
        micro_batch_tokens: int | None = None,
        deepspeed_extra: dict[str, Any] | None = None,
    ):
        import deepspeed

        self.world, self.module, self.training = world, module, training
        self.micro_batch_size, self.micro_batch_tokens = micro_batch_size, micro_batch_tokens
        self.steps = 0  # optimizer steps taken
        self._averaging = False
        module.requires_grad_(training is not None)
        if training is not None and hasattr(module, "lora"):
            train_adapters_only(module)
        if training is not None and training.gradient_checkpointing:
            compute_activations_again(module)
        if training is not None:
            bind_linears(module)
        bind_fused(module, world.device)
        bind_asked(module)
        trained = [p for p in module.parameters() if p.requires_grad]
        schedule = training.schedule if training else None
        self.engine = deepspeed.initialize(
            model=module,
            model_parameters=trained or None,
            optimizer=_optimizer(training, trained, world) if training else None,
            lr_scheduler=(lambda o: torch.optim.lr_scheduler.LambdaLR(o, schedule)) if schedule else None,
            config=zero3_config(world, self.dtype, training, deepspeed_extra or {}),
        )[0]
        self._whole = WholeWeights.of(self.engine, world)
        if self._whole is not None:
            bind_siblings(module)
        self._sums: GradientSums | None = None
        if training:
            # Where DeepSpeed reduces, every micro-batch is the last, so that no caller need know which one is.
            self.engine.set_gradient_accumulation_boundary(True)
            share_masters(self.engine.optimizer)
            self._sums = GradientSums.of(self.engine.optimizer, world)
        self.average: WeightAverage | None = None
        if training is not None and training.average is not None:
            self.average = WeightAverage(self.engine.optimizer, training.average)

    @property
    def _alone(self) -> int:
        return 1 if self.training is None else ALONE

    @property
    def stamp(self) -> tuple[int, bool]:
        """Which weights are in place: those of this optimizer step, or (True) their moving average."""
        return self.steps, self._averaging

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

    def hidden_states(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """tokens [B, S] -> last hidden states [B, S, H], or what else tells at every position what it has seen."""
        raise NotImplementedError(f"{type(self).__name__} does not tell its hidden states")

    def placed(self) -> AbstractContextManager[None]:
        """For several forwards and backwards: where the weights come and go in one piece, they are gathered once."""
        return nullcontext() if self._whole is None else self._whole.placed()

    def weights_of(self, part: nn.Module) -> AbstractContextManager[None]:
        """Those of one of its modules, to be read. Collective."""
        import deepspeed

        if self._whole is not None:
            return self._whole.placed()
        gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(list(part.parameters()))
        return gathered

    def _release(self) -> None:
        """Shards are about to change: no weight may stay as it was."""
        if self._whole is not None:
            self._whole.leave()

    @property
    def packs(self) -> bool:
        """Whether sequences can share a row, so that no forward computes padding. The first time collective."""
        return self._keeps_apart

    @cached_property
    def _keeps_apart(self) -> bool:
        # Both at once: before a loss begins, whose dropout must not depend on what ran before.
        with self.placed():
            found = keeps_apart(self.module, self.world, self.hidden_states)
            self._skips = found and gives_what_is_asked(self.module, self.world, self.hidden_states)
        return found

    def apart(self, rows: Packed | Padded, asked: Tensor) -> AbstractContextManager[None]:
        """For a forward of `rows` whose outputs are read where `asked [B, S]` is True, and nowhere else."""
        # Activations that are computed again are so when nothing is asked any more.
        again = self.training is not None and self.training.gradient_checkpointing and torch.is_grad_enabled()
        return rows.apart(asked if self._skips and not again else None)

    def rows(self, lengths: Tensor | None, width: int) -> Packed | Padded:
        """How a forward takes rows [B, S] that are `width` wide, of which `lengths [B]` tokens are real."""
        return Packed(lengths, width) if lengths is not None and self.packs else Padded()

    @span("forward and backward")
    def accumulate(self, loss: LossFunction, batch: Rows, weight: float = 1.0) -> dict[str, Tensor]:
        """Add the gradient of `weight · loss(batch)` to what the next `step` applies. Collective.

        `loss(model, micro_batch, count)` returns a `Loss` whose value is a sum of terms divided by `count`, the
        global `loss_count` of the batch. Returns the loss (under "loss") and its metrics, summed over micro-batches
        and ranks. A loss that no rank has terms for is 0.
        """
        count = self.world.sum(batch.loss_count.detach().to(self.world.device, torch.float64))
        count_pass(self.module, batch, backward=True)
        sums: dict[str, Tensor] = {}
        seen: list[tuple[Tensor, Rows]] = []
        micro_batches = self._micro_batches(batch)
        averaged_over = self.world.size if self._sums is None else 1  # DeepSpeed's reduction is a mean over ranks
        with self.placed(), self.dropout.on(self.steps) if self.dropout else nullcontext():
            for _, micro, real in micro_batches:
                result = loss(self, micro, count.clamp(min=1.0).float())
                seen.append((result.loss.detach(), micro))
                # A repeated micro-batch (a rank with fewer rows than others takes part in their collectives) adds
                # nothing.
                self.engine.backward(result.loss * (weight * averaged_over * real))
                for name, value in {"loss": result.loss, **result.metrics}.items():
                    sums[name] = sums.get(name, 0) + value.detach().double() * real
        if self._sums is not None:
            self._sums.reduce()
        summed = self._summed(sums)
        # The reduced loss is the same on every rank, so every rank stops, and before any weight has moved.
        if not torch.isfinite(summed["loss"]):
            where = self._not_finite(seen)
            raise NotFinite(
                f"the loss of step {self.steps + 1} is {float(summed['loss'])}{where}; no weight was changed"
            )
        return summed

    @torch.no_grad()
    def evaluate(self, loss: LossFunction, batch: Rows) -> dict[str, Tensor]:
        """What `accumulate` returns, without gradients."""
        count = self.world.sum(batch.loss_count.detach().to(self.world.device, torch.float64))
        count_pass(self.module, batch)
        sums: dict[str, Tensor] = {}
        with self.placed():
            for _, micro, real in self._micro_batches(batch, self._alone):
                result = loss(self, micro, count.clamp(min=1.0).float())
                for name, value in {"loss": result.loss, **result.metrics}.items():
                    sums[name] = sums.get(name, 0) + value.double() * real
        return self._summed(sums)

    @span("optimizer step")
    def step(self) -> float:
        """One optimizer step with the gradients accumulated since the last; returns their norm before clipping."""
        if self.training is None:
            raise RuntimeError("this model is frozen: it was built without `training`")
        if self._averaging:
            raise RuntimeError("the weights are their moving average: leave `averaged` before a step")
        count_step(self)
        self._release()
        if self._sums is not None:
            self._sums.finish()
        self.engine.step()
        if self._sums is not None:
            self._sums.release()
        self.steps += 1
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        if not math.isfinite(norm):
            # DeepSpeed leaves out a step whose gradient norm is not finite, whatever the type of the weights.
            raise NotFinite(f"the gradient norm of step {self.steps} is {norm}; no weight was changed")
        if self.average is not None:
            self.average.update()
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average in place of the weights, where one is kept. No step may be taken in here. Collective."""
        if self.average is None:
            yield
            return
        with self.average.in_place():
            self._averaging = True
            try:
                yield
            finally:
                self._averaging = False

    @torch.no_grad()
    def map(self, function: Callable[[Any], Tensor], batch: R, ends: bool = False) -> Tensor:
        """`function(micro_batch)` of this rank's rows, in their order, without gradients. Collective.

        `ends`: it asks for each row's last token alone.
        """
        count_pass(self.module, batch, ends=ends)
        # A repeated micro-batch is run as well, since its forward is collective, and its result is dropped.
        with self.placed():
            results = [(rows, function(micro), real) for rows, micro, real in self._micro_batches(batch, self._alone)]
        parts = [result for _, result, real in results if real]
        if not parts:
            return torch.empty(0, device=self.world.device)
        order = torch.tensor([row for rows, _, real in results if real for row in rows], device=parts[0].device)
        return torch.cat(parts)[order.argsort()]

    def save_pretrained(self, folder: Path | str, tokenizer: Any = None) -> None:
        """Write a folder that `from_pretrained` loads, streamed from the shards. Collective."""
        save_pretrained(self.module, Path(folder), self.world, tokenizer=tokenizer)

    def save_shards(self, shards: Shards, name: str) -> None:
        """Weights, fp32 masters, their average, optimizer and schedule of this rank, in DeepSpeed's own files.
        Collective."""
        state: dict[str, Any] = {"steps": self.steps}
        if self.average is not None:
            state["average"] = self.average.shards
        with shards.serving(self.engine):
            self.engine.save_checkpoint(str(shards.root), name, client_state=state, save_latest=False)

    def load_shards(self, shards: Shards, name: str) -> None:
        """What `save_shards` wrote, into a model as it was built. Collective."""
        self._release()
        with shards.serving(self.engine):
            path, state = self.engine.load_checkpoint(str(shards.root), name)
        if path is None:
            raise UserError(f"{shards.root / name}: holds no checkpoint of a model")
        self.steps = int(state["steps"])
        if self.average is not None:
            self.average.load(state.get("average"))

    def _micro_batches(self, batch: R, times: int = 1) -> Iterator[tuple[list[int], R, int]]:
        """As many on every rank: `(row numbers, those rows, 1)`, or `([0], the first row, 0)` to fill. `times`: as
        large as those of training.

        Packed sequences take as long as they have tokens, so every micro-batch gets about as many; where there is
        padding, rows of like length go together.
        """
        sizes = batch.sizes.tolist() if len(batch) else []
        size, tokens = times * self.micro_batch_size, self.micro_batch_tokens and times * self.micro_batch_tokens
        own = parts_needed(sizes, size, tokens)
        parts = int(self.world.max(own))
        if parts > 0 and not sizes:
            raise ValueError("a rank without any row cannot take part in a ZeRO-3 forward")
        most = None if tokens else size
        count = min(parts, len(sizes))
        dealt = balanced(sizes, count, most) if self.packs else by_length(sizes, count)
        pieces = [(rows, 1) for rows in dealt] + [([0], 0)] * (parts - count)
        return ((rows, batch.select(torch.tensor(rows)).to(self.world.device), real) for rows, real in pieces)

    def _not_finite(self, losses: list[tuple[Tensor, Rows]]) -> str:
        """ " on rank 1 (prompts 3, 7)": where micro-batches had such a loss, and the prompts in them. Collective."""
        bad = [rows for loss, rows in losses if not bool(loss.isfinite())]
        ids = [int(i) for rows in bad for i in getattr(rows, "ids", torch.empty(0))]
        found: list[Any] = [(bool(bad), ids)]
        if self.world.size > 1:
            found = [None] * self.world.size
            torch.distributed.all_gather_object(found, (bool(bad), ids))
        told = [
            f"rank {rank}" + (f" (prompts {', '.join(map(str, ids))})" if ids else "")
            for rank, (is_bad, ids) in enumerate(found)
            if is_bad
        ]
        return f" on {', '.join(told)}" if told else ""

    def _summed(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        if not sums:
            return {}
        names = sorted(sums)
        packed = self.world.sum(torch.stack([sums[n].to(self.world.device) for n in names]))
        return {n: v.cpu() for n, v in zip(names, packed, strict=True)}
