"""Gradients of a ZeRO-3 model, added up on each rank over its micro-batches and reduced once.

DeepSpeed reduces after every micro-batch: each gradient goes into a bucket, from there into one in the order of ranks,
through a reduction, and into the rank's shard, by a copy each. Here it is added where it is reduced from, once for each
micro-batch (or written there, where the product that it is can be), and a reduction follows the last one. That takes
room for a whole gradient, which DeepSpeed's bucket has where `reduce_bucket_size` allows it; larger models keep to
DeepSpeed's way. On one rank the shard is the whole gradient, and nothing is reduced.

Their memory is there from the first one to the step, and between free for rollouts and other models' gradients.

Letters: N ranks, P parameters of a rank's shard, every tensor's part rounded up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.engine.adam import Part, RowAdamW
from gearshift.engine.distributed import World
from gearshift.engine.memory import Scratch
from gearshift.engine.neighbours import Neighbours, neighbours
from gearshift.kernels.squared_norm import squared_norm
from gearshift.kernels.weight_sums import keep_sum


class GradientSums:
    """Takes the place of what DeepSpeed's ZeRO-3 `optimizer` does between a parameter's gradient and its step.

    `optimizer.grad_partitions_flat_buffer [P]` holds the sum (not the mean) over ranks after `reduce`.
    """

    def __init__(self, optimizer: Any, near: Neighbours | None):
        self._near = near
        self._optimizer, self._group = optimizer, optimizer.dp_process_group
        self._ranks = dist.get_world_size(self._group)
        self._parameters = [p for group in optimizer.fp16_groups for p in group]
        self._starts: dict[int, int] = {}  # ds_id -> where the parameter's part of the shard begins
        self._length = 0
        for parameter in self._parameters:
            self._starts[parameter.ds_id] = self._length
            self._length += parameter.partition_numel()
        self._seen: set[int] = set()  # parameters that have had a gradient since the last reduction (one rank: step)
        self._touched: set[int] = set()  # that may have been written since the memory was there
        self._rows: dict[int, list[Tensor]] = {}  # ds_id of a matrix of which nothing but these rows was written
        self._reduced = False  # since the last step
        optimizer.ipg_buckets[torch.float32].buffer = self._shard().new_empty(0)  # DeepSpeed's, for the same
        sums = self._shard() if self._ranks == 1 else self._shard().new_empty(self._ranks * self._length)
        # [N, P]: this rank's gradients, row by row in the shards of all ranks.
        self._sums = sums.view(self._ranks, self._length)
        self._memory = [Scratch(t) for t in {id(t): t for t in (self._shard(), sums)}.values()]
        for parameter in self._parameters:
            if (own := _Sum.of(self, parameter)) is not None:
                keep_sum(parameter, own)
        self.release()
        optimizer.reduce_ready_partitions_and_remove_grads = self._add
        optimizer._prepare_fp32_grad_for_sub_group = self._hand_over
        optimizer._get_norm_groups = self._norms
        optimizer.unscale_and_clip_grads = self._clip
        if isinstance(optimizer.optimizer, RowAdamW) and self._shard().device.type == "cpu":
            optimizer.optimizer.parts = self._parts_of_step

    @classmethod
    def of(cls, optimizer: Any, world: World) -> GradientSums | None:
        """None where DeepSpeed's way is kept: its bucket is too small, the optimizer's state is on the host, ranks are
        cut into groups, or its config has gradients without a bucket, quantized, or added up in another type than fp32.
        """
        ranks = dist.get_world_size(optimizer.dp_process_group)
        shard = sum(p.partition_numel() for group in optimizer.fp16_groups for p in group)
        fits = ranks == 1 or ranks * shard <= optimizer.reduce_bucket_size
        types = {optimizer.gradient_accumulation_dtype, *optimizer.ipg_buckets}
        plain = optimizer.contiguous_gradients and optimizer.all2all_process_group is None
        here = types == {torch.float32} and not optimizer.offload_optimizer and ranks == world.size
        return cls(optimizer, neighbours(world)) if fits and plain and here else None

    def begin(self) -> None:
        """There is memory for sums; those of parameters that are not `seen` hold anything."""
        if self._memory[-1].take():
            self._touched, self._rows = set(), {}
            self._clear_gaps()

    def touch(self, parameter: Any) -> None:
        """`begin`, and its sums will be written."""
        self.begin()
        self._touched.add(parameter.ds_id)
        self._rows.pop(parameter.ds_id, None)

    def touch_rows(self, parameter: Any, rows: Tensor) -> None:
        """The same of rows [T] of a matrix, to which something will be added."""
        self.begin()
        number, all_rows = parameter.ds_id, [*self._rows.pop(parameter.ds_id, []), rows]
        sparse = number not in self._touched or len(all_rows) > 1
        if not self.seen(parameter):
            self.clear(parameter)
        self._touched.add(number)
        if sparse and self._expects(parameter, sum(map(len, all_rows))):
            self._rows[number] = all_rows

    def _expects(self, parameter: Any, rows: int) -> bool:
        """Whether its sums are zeros of which writing so many rows will leave most without memory."""
        memory, size = self._memory[-1], parameter.ds_shape[1] * self._sums.element_size()
        few = [memory.expect(part, rows, size) for part in self.parts(parameter)]
        return memory.comes_empty and all(few)

    def clear(self, parameter: Any) -> None:
        """Zeros for a parameter that is not `seen`."""
        self.begin()
        if not (self._memory[-1].comes_empty and parameter.ds_id not in self._touched):
            for part in self.parts(parameter):
                part.zero_()

    def release(self) -> None:
        """A step was taken: its gradients are gone."""
        for memory in self._memory:
            memory.release()

    def seen(self, parameter: Any) -> bool:
        """Whether it has had a gradient that others join."""
        return parameter.ds_id in self._seen

    def see(self, parameter: Any) -> None:
        self._seen.add(parameter.ds_id)

    def parts(self, parameter: Any) -> Iterator[Tensor]:
        """Those of its gradient, in the order of ranks, without what rounding up leaves; there after `begin`."""
        part, start = parameter.partition_numel(), self._starts[parameter.ds_id]
        for rank in range(-(-parameter.ds_numel // part)):
            length = min(part, parameter.ds_numel - rank * part)
            yield self._sums[rank, start : start + length]

    def _clear_gaps(self) -> None:
        """What rounding up leaves, which nobody writes."""
        for parameter in self._parameters:
            part, start = parameter.partition_numel(), self._starts[parameter.ds_id]
            even, rest = divmod(parameter.ds_numel, part)
            if even < self._ranks:
                self._sums[even, start + rest : start + part] = 0
                self._sums[even + 1 :, start : start + part] = 0

    def _shard(self) -> Tensor:
        shard: Tensor = self._optimizer.grad_partitions_flat_buffer
        return shard

    @torch.no_grad()
    def _add(self, parameter: Any) -> None:
        """A parameter's gradient is there, from one micro-batch, if it has not joined already."""
        gradient = parameter.grad
        if gradient is None or not getattr(parameter, "ds_grad_is_ready", True):
            return
        self.touch(parameter)
        parts = list(self.parts(parameter))
        put = Tensor.add_ if self.seen(parameter) else Tensor.copy_
        for part, own in zip(parts, gradient.reshape(-1).split(len(parts[0])), strict=True):
            put(part, own)
        self.see(parameter)
        parameter.grad = None

    @torch.no_grad()
    def reduce(self) -> None:
        """The last micro-batch of a loss is through: its gradients join the step's. Collective."""
        if self._ranks == 1:
            return
        self._clear_unseen()
        self._memory[0].take()
        own = torch.empty_like(self._shard()) if self._reduced else self._shard()
        if self._near is None:
            dist.reduce_scatter_tensor(own, self._sums.view(-1), group=self._group)
        else:
            self._near.reduce_scatter(own, self._sums)
        self._memory[-1].release()
        if self._reduced:
            self._shard().add_(own)
        self._seen, self._reduced = set(), True

    @torch.no_grad()
    def finish(self) -> None:
        """A step comes next: parameters that no micro-batch has used have no gradient in it."""
        if self._ranks == 1:
            self._clear_unseen()
        elif self._memory[0].take():  # no loss came
            self._shard().zero_()
        self._seen, self._reduced = set(), False

    def _clear_unseen(self) -> None:
        for parameter in self._parameters:
            if not self.seen(parameter):
                self.clear(parameter)

    # --- the step --------------------------------------------------------------------------------------------------

    def _group_gradient(self, number: int) -> Tensor:
        """Of one of the groups of parameters that are stepped one after the other: neighbours in the shard."""
        lengths = [flat.numel() for flat in self._optimizer.fp32_partitioned_groups_flat]
        start = sum(lengths[:number])
        return self._shard()[start : start + lengths[number]]

    def _hand_over(self, number: int) -> None:
        """DeepSpeed flattens a group's gradients into a copy."""
        flat = self._optimizer.fp32_partitioned_groups_flat[number]
        flat.grad = self._group_gradient(number).to(flat.dtype)
        self._optimizer.averaged_gradients[number] = None

    @torch.no_grad()
    def _norms(self) -> list[Tensor]:
        """Of each group's gradient over all ranks, in fp64, as DeepSpeed counts them: -1 for one that is not finite."""
        groups = range(len(self._optimizer.fp32_partitioned_groups_flat))
        squares = torch.stack([squared_norm(self._group_gradient(number)) for number in groups])
        dist.all_reduce(squares, group=self._group)
        norms = squares.sqrt()
        return list(torch.where(norms.isfinite(), norms, -1.0))

    @torch.no_grad()
    def _clip(self, number: int, norm: Tensor) -> None:
        """A group's gradient, so that the norm of all becomes DeepSpeed's bound for it if it is more. Where nothing was
        written nothing is."""
        scale, bound = self._optimizer.loss_scale, self._optimizer.clip_grad
        if bound > 0:
            scale = ((norm / scale + 1e-6) / bound).clamp(min=1.0) * scale
        if self._shard().device.type == "cpu" and scale == 1.0:
            return  # on a GPU it would have to be asked
        whole = self._optimizer.fp32_partitioned_groups_flat[number].grad
        for part in self._parts_of_group(number):
            written = whole[part.start : part.end]
            if part.rows is None:
                written.mul_(1.0 / scale)
            else:
                written.view(-1, part.width)[part.rows] *= 1.0 / scale

    def _parts_of_step(self, flat: Tensor) -> Iterator[Part]:
        """Of a group's fp32 weights."""
        groups = self._optimizer.fp32_partitioned_groups_flat
        return self._parts_of_group(next(number for number, own in enumerate(groups) if own is flat))

    def _parts_of_group(self, number: int) -> Iterator[Part]:
        """A group's gradient, divided so that matrices of which only some rows may be other than 0 are parts."""
        first = end = 0
        for parameter in self._optimizer.fp16_groups[number]:
            start, end = end, end + parameter.partition_numel()
            if self._ranks == 1 and (rows := self._rows.get(parameter.ds_id)):
                if first < start:
                    yield Part(first, start)
                yield Part(start, end, torch.cat(rows).unique(), parameter.ds_shape[1])
                first = end
        if first < end:
            yield Part(first, end)


# Rows of a product that a rank's part of a weight must have to be worth one of its own.
_FEWEST_ROWS = 64


class _Sum:
    """The part of a weight [O, I]: see `kernels.weight_sums`."""

    def __init__(self, sums: GradientSums, parameter: Any):
        self._sums, self._parameter = sums, parameter
        self._pieces: list[tuple[int, Tensor]] = []  # whole rows of the gradient, and which of them is the first
        self._edges: list[tuple[int, int, Tensor]] = []  # parts of a row that is cut: its number, the first column
        columns, at = parameter.ds_shape[1], 0
        for part in sums.parts(parameter):
            before = min(-at % columns, len(part))  # the rest of a row
            after = (len(part) - before) % columns
            rows = part[before : len(part) - after].view(-1, columns)
            if before:
                self._edges.append((at // columns, at % columns, part[:before]))
            self._pieces.append(((at + before) // columns, rows))
            at += len(part)
            if after:
                self._edges.append((at // columns, 0, part[len(part) - after :]))

    @classmethod
    def of(cls, sums: GradientSums, parameter: Any) -> _Sum | None:
        """None for what is no matrix, of another type, or cut into parts of few rows."""
        if len(parameter.ds_shape) != 2 or parameter.dtype != torch.float32:
            return None
        part, columns = parameter.partition_numel(), parameter.ds_shape[1]
        return cls(sums, parameter) if part >= min(parameter.ds_numel, _FEWEST_ROWS * columns) else None

    @torch.no_grad()
    def add_product(self, first: int, left: Tensor, right: Tensor) -> None:
        self._sums.touch(self._parameter)
        end, joins = first + left.shape[1], self._sums.seen(self._parameter)
        for start, piece in self._pieces:
            low, high = max(first, start), min(end, start + len(piece))
            if low < high:
                rows, factor = piece[low - start : high - start], left[:, low - first : high - first].t()
                rows.addmm_(factor, right) if joins else torch.mm(factor, right, out=rows)
        for row, column, edge in self._edges:
            if first <= row < end:
                found = left[:, row - first] @ right[:, column : column + len(edge)]
                edge.add_(found) if joins else edge.copy_(found)

    @torch.no_grad()
    def add_rows(self, rows: Tensor, values: Tensor) -> None:
        self._sums.touch_rows(self._parameter, rows)
        for start, piece in self._pieces:
            here = (rows >= start) & (rows < start + len(piece))
            piece.index_add_(0, rows[here] - start, values[here])
        for row, column, edge in self._edges:
            edge.add_(values[rows == row, column : column + len(edge)].sum(0))

    def done(self) -> None:
        self._sums.see(self._parameter)
