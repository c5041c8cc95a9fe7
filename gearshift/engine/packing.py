"""Sequences one after another in a single row, without padding, and the attention that keeps them apart.

Letters: B rows, S width, N tokens of all sequences, M tokens of the longest, D head size.

`transformers` packs by a mask of [N, N], of which attention then computes every element. Here all sequences go to the
compiled `kernels.causal_attention`, or on a GPU to torch's variable-length flash attention; where neither serves, its
SDPA attention is given one after another (those of equal length together). What a model's masks say beside that
(sliding windows, chunks) is asked of them for the longest sequence, which stands first in the row; every other sequence
sees a part of it.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor

from gearshift.engine.distributed import World
from gearshift.kernels.causal_attention import causal_attention, serves

# (tokens [1, N], positions [1, N] or None) -> [1, N, ...]
Run = Callable[[Tensor, Tensor | None], Tensor]


class Padded:
    """Rows as they are."""

    positions: Tensor | None = None

    def join(self, values: Tensor) -> Tensor:
        return values

    def spread(self, values: Tensor) -> Tensor:
        return values

    @contextmanager
    def apart(self, asked: Tensor | None = None) -> Iterator[None]:
        yield


class Packed:
    """Right-padded rows [B, S], of which `lengths [B]` tokens are real, as one row [1, N]."""

    def __init__(self, lengths: Tensor, width: int):
        order = lengths.argsort(descending=True, stable=True)
        columns = torch.arange(width, device=lengths.device)
        rows, self._columns = (columns < lengths[order, None]).nonzero(as_tuple=True)
        self._cells = order[rows] * width + self._columns
        self._shape = len(lengths), width
        self.positions: Tensor | None = self._columns[None]
        self.sequences = _Sequences([length for length in lengths[order].tolist() if length])

    def join(self, values: Tensor) -> Tensor:
        """[B, S] -> [1, N]."""
        return values.flatten()[self._cells][None]

    def spread(self, values: Tensor) -> Tensor:
        """[1, N, ...] -> [B, S, ...], 0 where there is padding; differentiable."""
        rows, width = self._shape
        cells = values.new_zeros(rows * width, *values.shape[2:])
        return cells.index_copy(0, self._cells, values[0]).unflatten(0, (rows, width))

    @contextmanager
    def apart(self, asked: Tensor | None = None) -> Iterator[None]:
        """A forward of the joined row in here keeps the sequences apart; so does its backward, wherever it runs.

        asked [B, S] bool: its outputs elsewhere may be anything (`engine.asked`); None: all are asked for.
        """
        if asked is not None:
            self.sequences.ask(self.join(asked)[0])
        try:
            with self.sequences.current():
                yield
        finally:
            self.sequences.asked = None  # a model's masks outlive the forward


# --- attention -------------------------------------------------------------------------------------------------------


class _Sequences:
    """The lengths of the sequences of a packed row, longest first; a model's masks carry it to each layer."""

    now: _Sequences | None = None  # of the forward that is running

    def __init__(self, lengths: list[int]):
        self.lengths = lengths
        self.layers = 0  # how many have kept them apart
        self.crossed = False  # one could not
        self.asked: Tensor | None = None  # [n]: of which of the tokens outputs are asked for; None: of all
        self.spared = 0  # how many times others were left out

    def ask(self, asked: Tensor) -> None:
        """asked [N] bool."""
        places = asked.nonzero()[:, 0]
        self.asked = places if 0 < len(places) < len(asked) else None

    @contextmanager
    def current(self) -> Iterator[None]:
        _Sequences.now = self
        try:
            yield
        finally:
            _Sequences.now = None

    def runs(self) -> Iterator[tuple[int, int]]:
        """(sequences, length) of each run of sequences of one length."""
        for length, run in groupby(self.lengths):
            yield len(list(run)), length

    def offsets(self, device: torch.device) -> Tensor:
        """[sequences + 1] int32: where each begins, and where the last ends."""
        ends = torch.tensor([0, *self.lengths], device=device).cumsum(0)
        return ends.to(torch.int32)


def asked_now(states: Tensor) -> Tensor | None:
    """Of which tokens [n] of states [1, N, H] the forward that is running is asked for outputs; None: of all."""
    sequences = _Sequences.now
    if sequences is None or sequences.asked is None or states.shape[:2] != (1, sum(sequences.lengths)):
        return None
    sequences.spared += 1
    return sequences.asked


def register() -> None:
    """Make the attention known to `transformers`, in the place of its "sdpa", which it is where nothing is packed."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("sdpa", _attention)
    AttentionMaskInterface.register("sdpa", _mask)


def _mask(**asked: Any) -> Tensor | None:
    """The longest sequence's mask [1, 1, M, M], or one element that stands for the causal one."""
    from transformers.masking_utils import sdpa_mask

    sequences = _Sequences.now
    if sequences is None:
        mask: Tensor | None = sdpa_mask(**asked)
        return mask
    place = torch.arange(sequences.lengths[0], device=asked.get("device"))
    zero = place.new_zeros(())
    query, key = place[:, None], place[None]
    visible = torch.as_tensor(asked["mask_function"](zero, zero, query, key)).expand(len(place), len(place))
    causal = torch.equal(visible, query >= key)
    return _Carried(sequences, None if causal else visible[None, None].contiguous()).tensor


class _Carried:
    """What a layer is to do, behind a tensor that a model hands to its layers as their mask.

    Found by the tensor's memory: DeepSpeed's hooks replace tensors by views of them. The last few are kept, so that the
    memory stays theirs until after the backward. Past that, or elsewhere, the tensor is no mask: SDPA refuses int8.
    """

    known: ClassVar[OrderedDict[int, _Carried]] = OrderedDict()

    def __init__(self, sequences: _Sequences, visible: Tensor | None):
        self.sequences, self.visible = sequences, visible  # [1, 1, M, M] bool; None: the causal one
        self.tensor = torch.zeros(1, 1, 1, 1, dtype=torch.int8)
        self.known[self.tensor.data_ptr()] = self
        while len(self.known) > 16:
            self.known.popitem(last=False)

    @classmethod
    def by(cls, mask: Tensor | None) -> _Carried | None:
        if mask is None or mask.dtype != torch.int8:
            return None
        return cls.known.get(mask.untyped_storage().data_ptr())


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """`transformers`' attention signature: query [1, heads, N, D] -> [1, N, heads, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    carried = _Carried.by(attention_mask)
    if carried is None and _Sequences.now is not None:
        _Sequences.now.crossed, attention_mask = True, None  # the model made another mask of it
    if carried is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **more)
        return found
    sequences, visible = carried.sequences, carried.visible
    sequences.layers += 1
    sequences.crossed |= more.get("position_bias") is not None
    if visible is None and _has_flash(query, key, value, more):
        return _flash(query, key, value, sequences, more), None
    if visible is None and _has_kernel(query, key, value, sequences, more):
        q, k, v = map(_tokens_first, (query, key, value))
        return causal_attention(q, k, v, sequences.lengths, more["scaling"])[None], None
    parts, runs = [], list(sequences.runs())
    split = [_split(states, [count * length for count, length in runs]) for states in (query, key, value)]
    for (count, length), *own in zip(runs, *split, strict=True):
        own_query, own_key, own_value = (states.unflatten(0, (count, length)).transpose(1, 2) for states in own)
        mask = None if visible is None else visible[..., :length, :length]
        out, _ = sdpa_attention_forward(module, own_query, own_key, own_value, mask, **more)
        parts.append(out.reshape(1, count * length, *out.shape[2:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), None


def _tokens_first(states: Tensor) -> Tensor:
    """[1, heads, N, D] as [N, heads, D], as a projection has it in memory. Not by an index, whose backward fills a
    tensor of zeros."""
    return states.squeeze(0).transpose(0, 1)


def _split(states: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """[1, heads, N, D] as parts [n, heads, D]. Not by slices, whose backward fills a tensor as large as the whole; that
    of this is one concatenation, or nothing for a single part."""
    whole = _tokens_first(states)
    return whole.split(sizes) if len(sizes) > 1 else (whole,)


def _has_flash(query: Tensor, key: Tensor, value: Tensor, asked: dict[str, Any]) -> bool:
    """Whether torch's variable-length attention serves: half precision on a GPU, heads of one size."""
    alike = query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256
    half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    return half and alike and not asked.get("dropout")


# Longer sequences are torch's: its products are larger than a head of ours, and faster.
_LONGEST = 1024


def _has_kernel(query: Tensor, key: Tensor, value: Tensor, sequences: _Sequences, asked: dict[str, Any]) -> bool:
    """Whether the compiled attention serves: it takes all sequences at once, head by head."""
    busy = len(sequences.lengths) * key.shape[1] >= torch.get_num_threads()
    plain = asked.get("scaling") is not None and not asked.get("dropout")
    return sequences.lengths[0] <= _LONGEST and busy and plain and serves(*map(_tokens_first, (query, key, value)))


def _flash(query: Tensor, key: Tensor, value: Tensor, sequences: _Sequences, asked: dict[str, Any]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = sequences.offsets(query.device), sequences.lengths[0]
    states: Any = [_tokens_first(part) for part in (query, key, value)]
    # Since 2.12 it must be told that several query heads share one of the keys; before, it sees it.
    grouped: Any = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    attend: Any = varlen_attn
    out: Tensor = attend(
        *states, offsets, offsets, longest, longest, scale=asked.get("scaling"), window_size=(-1, 0), **grouped
    )
    return out[None]


# --- whether a model can ---------------------------------------------------------------------------------------------


class Trial:
    """Two sequences that a model is given to see what it makes of a row that they share."""

    def __init__(self, model: Any, world: World, run: Run):
        self._run = run
        self._exact = next(model.parameters()).dtype == torch.float32
        self.lengths = torch.tensor([7, 9], device=world.device)
        vocabulary = model.get_input_embeddings().num_embeddings
        self.tokens = torch.arange(18, device=world.device).view(2, 9) * 31 % vocabulary

    @torch.no_grad()
    def packed(self, asked: Tensor | None = None) -> tuple[Tensor, Packed]:
        """Outputs [2, 9, ...] of the row, and the row."""
        rows = Packed(self.lengths, 9)
        with rows.apart(asked):
            return rows.spread(self._run(rows.join(self.tokens), rows.positions)), rows

    def agree(self, found: Tensor, right: Tensor) -> bool:
        """To rounding."""
        largest = max(1.0, float(right.abs().max()))
        return float((found - right).abs().max()) <= largest * (1e-5 if self._exact else 2e-2)


@torch.no_grad()
def keeps_apart(model: Any, world: World, run: Run) -> bool:
    """Whether `model` keeps apart sequences that share a row: two of them so, against each alone, by `run`. Collective.

    Not those without positions as an argument, with an attention that is not SDPA, or with layers of another kind.
    """
    config = model.config.get_text_config()
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return False
    if config._attn_implementation != "sdpa":
        return False
    register()
    trial = Trial(model, world, run)
    padded = run(trial.tokens, None)  # right-padded: no sequence sees the other, nor what follows it
    found, rows = trial.packed()
    real = torch.arange(9, device=world.device) < trial.lengths[:, None]
    every_layer = rows.sequences.layers >= config.num_hidden_layers and not rows.sequences.crossed
    return not world.max(float(not (trial.agree(found[real], padded[real]) and every_layer)))
