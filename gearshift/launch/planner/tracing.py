"""One micro-batch through a model without weights: when which bytes come and go, and when which layer is at work.

The model stands on the meta device, so that shapes alone are computed; what is recorded is exact in them for any
architecture, and takes a second for a hundred layers.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from gearshift.kernels.head import CHUNK
from gearshift.launch.planner.live import LiveBytes

META = torch.device("meta")
Kind = Literal["live", "fetch", "release", "keep", "drop", "gradient", "scratch"]


@dataclass(frozen=True)
class Event:
    """`live`: so many bytes of activations are there now; `scratch`: so many beside them for a moment; `fetch` and
    `release`: the layer (by its place in `Timeline.layers`) begins or ends to use its weights, in both passes;
    `gradient`: that of the parameter of this number is there; `keep` and `drop`: autograd saves a view of a parameter,
    or is done with it."""

    kind: Kind
    value: int


@dataclass
class Timeline:
    """`layers`: the parameters, by number, that each module has of its own (none: it has layers inside); `numel`: of
    each parameter; `forward`: fetches in the forward pass."""

    layers: list[list[int]]
    numel: list[int]
    forward: int = 0
    events: list[Event] = field(default_factory=list)

    @property
    def activations(self) -> int:
        """The most bytes of them at once."""
        return max((event.value for event in self.events if event.kind == "live"), default=0)


def extended(two: Timeline, three: Timeline, rows: int) -> Timeline | None:
    """The timeline of `rows` rows, from those of two and three; None where these did not run alike."""
    if [e.kind for e in two.events] != [e.kind for e in three.events]:
        return None
    grown = [
        Event(a.kind, a.value + (rows - 2) * (b.value - a.value)) for a, b in zip(two.events, three.events, strict=True)
    ]
    return replace(two, events=grown)


class _Counting(LiveBytes):
    """On the meta device, where an operator of ours has shapes alone and tells its scratch memory apart."""

    def __init__(self, events: list[Event], targets: int):
        super().__init__(lambda size: events.append(Event("live", size)))
        self._events, self._targets = events, targets

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.namespace == "gearshift":
            self._events.append(Event("scratch", head_scratch(func._schema.name, args, self._targets)))
        return func(*args, **kwargs)


def head_scratch(name: str, args: Any, targets: int) -> int:
    """What `linear_logprob` or `linear_kl` need beside inputs and results, of which `targets` positions have a target:
    their rows, two chunks of logits in fp32, and copies in fp32 of what comes in a narrower type."""
    matrices = [a for a in args if isinstance(a, Tensor) and a.is_floating_point() and a.dim() == 2]
    hidden, weight = [m for m in matrices if m.shape[1] == matrices[0].shape[1]][:2]
    width, columns = hidden.shape[1], min(CHUNK, weight.shape[0])
    rows = 0 if targets >= len(hidden) else targets * width * hidden.element_size()
    wide = 0 if hidden.dtype == torch.float32 else 4 * (targets + columns) * width
    gradient = 4 * targets * width if name.endswith("_backward") else 0
    models = 2 if "linear_kl" in name else 1
    return models * (2 * 4 * targets * columns + rows + wide + gradient)


class _Attention(torch.autograd.Function):
    """Attention as fused kernels keep it for the backward pass: inputs, output and one number a row and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _WithoutValues(TorchFunctionMode):
    """What a model asks of values gets the answer that plain rows of tokens would give (no packed sequences)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__:
            return True
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3]) if len(args) >= 3 else _Attention.apply(**kwargs)
        return func(*args, **(kwargs or {}))


def trace(
    model: nn.Module, forward: Callable[[], Tensor | tuple[Tensor, ...]], train: bool, targets: int = 0
) -> Timeline:
    """`forward()` runs one micro-batch through the model, which is on the meta device, and asks for log-probs at so
    many `targets`; with `train` its backward follows."""
    parameters = list(dict.fromkeys(model.parameters()))
    number = {id(p): n for n, p in enumerate(parameters)}
    modules = list(model.modules())
    layers = [[number[id(p)] for p in m.parameters(recurse=False)] for m in modules]
    timeline = Timeline(layers, [p.numel() for p in parameters])
    counting = _Counting(timeline.events, targets)
    counting.ignore(*model.parameters(), *model.buffers())
    hooks = _hooks(modules, parameters, timeline.events, counting, train)
    saving = _Saving(parameters, timeline.events)
    saved = torch.autograd.graph.saved_tensors_hooks(saving.pack, saving.unpack)
    with warnings.catch_warnings(), hooks, torch.set_grad_enabled(train), _WithoutValues(), counting, saved:
        warnings.simplefilter("ignore")  # torch's, of modules whose backward hooks cannot fire: those inside do
        found = forward()
        timeline.forward = sum(event.kind == "fetch" for event in timeline.events)
        if train:
            _backward(_total(found))
        del found
        timeline.events.append(Event("live", counting.bytes))
    return timeline


class _Saved:
    """What autograd holds in place of a saved tensor."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class _Saving:
    """Notes which saved tensors are views of parameters: these stay when ZeRO-3 lets go of the parameter itself."""

    def __init__(self, parameters: list[nn.Parameter], events: list[Event]):
        self._events = events
        self._number = {p.untyped_storage()._cdata: n for n, p in enumerate(parameters)}

    def pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        number = self._number.get(tensor.untyped_storage()._cdata)
        if number is not None and not isinstance(tensor, nn.Parameter):
            self._events.append(Event("keep", number))
            weakref.finalize(saved, self._events.append, Event("drop", number)).atexit = False
        return saved

    def unpack(self, saved: _Saved) -> Tensor:
        return saved.tensor


def _total(found: Tensor | tuple[Tensor, ...]) -> Tensor:
    parts = [found] if isinstance(found, Tensor) else list(found)
    return torch.stack([part.sum() for part in parts]).sum()


def _backward(total: Tensor) -> None:
    """`total.backward()`, during which torch would turn off `_WithoutValues`, though layers may run again in it."""
    _engine_run_backward((total,), (torch.ones_like(total),), False, False, (), True, True)


@contextmanager
def _hooks(
    modules: list[nn.Module], parameters: list[nn.Parameter], events: list[Event], counting: LiveBytes, train: bool
) -> Iterator[None]:
    """Notes each layer's begin and end in both passes, and each gradient, which is dropped."""
    handles: list[Any] = []

    def note(kind: Kind, value: int) -> Callable[..., None]:
        def write(*_: Any) -> None:
            events.append(Event("live", counting.bytes))
            events.append(Event(kind, value))

        return write

    def drop(number: int) -> Callable[[Tensor], None]:
        write = note("gradient", number)

        def hook(parameter: Tensor) -> None:
            write()
            parameter.grad = None

        return hook

    for number, module in enumerate(modules):
        handles.append(module.register_forward_pre_hook(note("fetch", number)))
        handles.append(module.register_forward_hook(note("release", number)))
        if train:
            handles.append(module.register_full_backward_pre_hook(note("fetch", number)))
            if list(module.parameters(recurse=False)):
                handles.append(module.register_full_backward_hook(note("release", number)))
    for number, parameter in enumerate(parameters):
        if train and parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(drop(number)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
