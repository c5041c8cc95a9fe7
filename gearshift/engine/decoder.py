"""The step that a generation repeats: the newest token of every row through the model, and the next one drawn.

Letters: n rows, H hidden, r >= n rows that a recording has.

The step is recorded where that can be done, so that its hundreds of small operations cost no Python: on a GPU as a
CUDA graph, on a processor as a `Tape`. A recording has fixed sizes and addresses: there is one for each of a few
numbers of rows and (on a GPU) widths of the cache, and all of them go when what they read moves.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gearshift.engine.distributed import now
from gearshift.engine.sampling import Sampling, sample_tokens
from gearshift.engine.tape import Tape
from gearshift.engine.tensor_parallel import TensorParallelGroup
from gearshift.errors import one_line
from gearshift.kernels import native

if TYPE_CHECKING:
    from gearshift.engine.replica import Replica

# Fewest rows that a recording on a GPU has, where the cache has as many: few rows cost it as much as one.
_FEWEST_ROWS = 8
# On a processor, where more rows cost more: the most that gain from a recording, how often a number of rows must have
# come up before one is made, and how many are made (each keeps the tensors of a step).
_MOST_ROWS, _WORTH, _MOST_RECORDINGS = 32, 3, 8


class Feed(NamedTuple):
    """What a step reads of each row: its newest token `[n]` int64 and the position of it (−1: no row, its result is
    never read), and the uniform `[n]` fp32 that the next draw is made with."""

    tokens: Tensor
    positions: Tensor
    uniforms: Tensor


def decode_step(replica: Replica, sampling: Sampling, feed: Feed, width: int) -> tuple[Tensor, Tensor]:
    """Tokens drawn [n] int64 and their log-probs [n] fp32; `width` is above every position.

    Which operations run depends on sizes and settings alone, never on what tensors hold, and no device is waited for.
    """
    replica.cache.begin_decode(feed.positions, width)
    hidden = replica.hidden(feed.tokens[:, None], feed.positions.clamp(min=0)[:, None])[:, -1]
    return draw(replica, sampling, hidden, feed.uniforms)


def draw(replica: Replica, sampling: Sampling, hidden: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens drawn [n] int64 after hidden states [n, H], and their log-probs [n] fp32."""
    return sample_tokens(
        hidden, replica.head, sampling.temperature, uniforms, replica.group, sampling.top_k, sampling.top_p
    )


class Recorder(Protocol):
    exact: bool
    """A recording serves the very number of rows that it was made with, at any width of the cache."""
    block: int
    """Columns by which the cache grows: fewer steps of it are fewer recordings."""

    def __init__(self) -> None: ...

    def record(self, step: Callable[[], None]) -> Callable[[], Any]:
        """Runs `step`, which reads and writes tensors that stay where they are; what is returned does it again."""


class CudaGraphs:
    """Records on a GPU. Recordings share the memory of what they compute on the way, so each result has to be copied
    out before another one runs."""

    exact, block = False, 256

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, step: Callable[[], None]) -> Callable[[], Any]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()  # libraries and NCCL set themselves up on first use, which cannot be recorded
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog, a thread of its own, may ask for events meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        return graph.replay


def recorder_of(group: TensorParallelGroup, dtype: torch.dtype, device: torch.device) -> type[Recorder] | None:
    """What makes a recorder of steps, or None where they cannot be recorded.

    On a processor: the attention must be the compiled one, whose cost does not grow with the cache's width, and the
    group's sums must go through shared memory, since gloo's are not operations that could be done again.
    """
    if device.type == "cuda":
        return CudaGraphs
    compiled = device.type == "cpu" and dtype == torch.float32 and native.built() is not None
    return Tape if compiled and (group.size == 1 or group.neighbours is not None) else None


class _Size(NamedTuple):
    """What a recording is good for."""

    rows: int
    width: int
    temperature: float
    top_k: int | None
    top_p: float


class Decoder:
    """Runs the steps of one replica: recorded where there is a recorder, else as they come.

    `seconds`: what recording has taken since it was set to 0.
    """

    def __init__(self, replica: Replica, device: torch.device, recorder: type[Recorder] | None = None):
        """`recorder`: makes one; None: nothing is recorded."""
        self._replica, self._device, self._new_recorder = replica, device, recorder
        self.seconds = 0.0
        self.forget()

    @property
    def records(self) -> bool:
        return self._new_recorder is not None

    def forget(self) -> None:
        """Drop all recordings: what they read is about to go, or has gone."""
        self._table: dict[_Size, Callable[[], Any]] = {}
        self._unproven: set[_Size] = set()  # exact ones that have not been held against the step itself
        self._came: Counter[_Size] = Counter()
        self._recorder: Recorder | None = None
        self._version = -1  # of the cache that the recordings read

    def step(self, sampling: Sampling, feed: Feed, longest: int) -> tuple[Tensor, Tensor]:
        """See `decode_step`; `longest`: no position is above it. The results hold until the next step. Collective over
        the replica's group, whose ranks pass the same."""
        if not self.records:
            return decode_step(self._replica, sampling, feed, longest + 1)
        if self._version != self._replica.cache.version:
            self._begin()
        n = len(feed.tokens)
        size = self._size(n, longest + 1, sampling)
        feed = feed._replace(tokens=feed.tokens.clone())  # maybe the last results, which recording writes over
        for held, given in zip(self._feed, feed, strict=True):
            held[:n] = given
        self._feed.positions[n : size.rows] = -1
        if size not in self._table and not (self._is_wanted(size) and self._record(size, sampling)):
            return decode_step(self._replica, sampling, feed, longest + 1)
        if size in self._unproven:
            return self._prove(size, sampling, feed, longest)
        self._table[size]()
        return self._tokens[:n], self._logprobs[:n]

    def _is_wanted(self, size: _Size) -> bool:
        assert self._recorder is not None
        if not self._recorder.exact:
            return True
        self._came[size] += 1
        few = size.rows <= _MOST_ROWS and len(self._table) < _MOST_RECORDINGS
        return few and self._came[size] > _WORTH

    def _prove(self, size: _Size, sampling: Sampling, feed: Feed, longest: int) -> tuple[Tensor, Tensor]:
        """The step itself and its recording, on what was not there when it was made: both must give the same bits.

        A step that reads values through Python in a way that nobody has noticed would be found here.
        """
        tokens, logprobs = decode_step(self._replica, sampling, feed, longest + 1)
        self._table[size]()
        n = len(tokens)
        same = torch.equal(tokens, self._tokens[:n]) and torch.equal(logprobs, self._logprobs[:n])
        if self._all(same):
            self._unproven.discard(size)
        else:
            self._give_up(RuntimeError("a recorded step gave other results than the step itself"))
        return tokens, logprobs

    def _all(self, holds: bool) -> bool:
        """Whether it holds on every rank of the group. Collective."""
        failed = self._replica.group.all_reduce(torch.tensor([float(not holds)], device=self._device))
        return not bool(failed > 0)

    def _begin(self) -> None:
        self.forget()
        assert self._new_recorder is not None
        self._recorder, self._version = self._new_recorder(), self._replica.cache.version
        rows = self._replica.cache.rows
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=self._device)
        self._logprobs = torch.zeros(rows, device=self._device)
        self._feed = Feed(*(torch.zeros_like(own) for own in (self._tokens, self._tokens, self._logprobs)))

    def _size(self, rows: int, width: int, sampling: Sampling) -> _Size:
        """Powers of two on a GPU, so that there are few recordings."""
        cache = self._replica.cache
        assert self._recorder is not None
        if self._recorder.exact:
            return _Size(rows, cache.capacity, sampling.temperature, sampling.top_k, sampling.top_p)
        blocks = -(-width // cache.block)
        return _Size(
            min(max(_FEWEST_ROWS, _power_of_two(rows)), cache.rows),
            min(_power_of_two(blocks) * cache.block, cache.capacity),
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
        )

    def _record(self, size: _Size, sampling: Sampling) -> bool:
        """Whether it could be done, on every rank of the group; if not, nothing is recorded from then on."""
        feed = Feed(*(held[: size.rows] for held in self._feed))
        tokens, logprobs = self._tokens[: size.rows], self._logprobs[: size.rows]

        def step() -> None:
            results = decode_step(self._replica, sampling, feed, size.width)
            tokens.copy_(results[0])
            logprobs.copy_(results[1])

        start, error = now(self._device), None
        assert self._recorder is not None
        try:
            self._table[size] = self._recorder.record(step)
        except (ConnectionError, MemoryError):
            raise  # the others are gone, or in the middle of the step
        except Exception as caught:
            error = caught
        if not self._all(error is None):
            self._give_up(error)
        elif self._recorder.exact:
            self._unproven.add(size)
        self.seconds += now(self._device) - start
        return self.records

    def _give_up(self, error: Exception | None) -> None:
        self._new_recorder = None
        self.forget()
        if error is not None or self._replica.group.rank == 0:
            name, why = type(self._replica.model).__name__, "another rank failed" if error is None else one_line(error)
            print(f"gearshift: {name}: decoding goes on without recorded steps: {why}", file=sys.stderr)


def _power_of_two(number: int) -> int:
    """The next one that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()
