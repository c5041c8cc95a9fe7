"""The step that a generation repeats: the newest token of every row through the model, and the next one drawn.

Letters: n rows, H hidden, r >= n rows that a recording has.

On a GPU the step is recorded as a CUDA graph, so that its hundreds of small kernels cost one launch. A graph has fixed
sizes and addresses: there is one for each of a few numbers of rows and widths of the cache, made when it is first
needed, and all of them go when what they read moves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gearshift.engine.distributed import now
from gearshift.engine.sampling import Sampling, sample_tokens, uniforms
from gearshift.errors import one_line

if TYPE_CHECKING:
    from gearshift.engine.replica import Replica

# Fewest rows that a recording has, where the cache has as many: few rows cost a GPU as much as one.
_FEWEST_ROWS = 8


class Feed(NamedTuple):
    """What a step reads of each row, `[n]` int64: its newest token and the position of it (−1: no row, its result is
    never read), and what the next draw depends on (see `uniforms`; `counts`: tokens drawn so far)."""

    tokens: Tensor
    positions: Tensor
    draws: Tensor
    samples: Tensor
    counts: Tensor
    seeds: Tensor


def decode_step(replica: Replica, sampling: Sampling, feed: Feed, width: int) -> tuple[Tensor, Tensor]:
    """Tokens drawn [n] int64 and their log-probs [n] fp32; `width` is above every position.

    Which operations run depends on sizes and settings alone, never on what tensors hold, and no device is waited for.
    """
    replica.cache.begin_decode(feed.positions, width)
    hidden = replica.hidden(feed.tokens[:, None], feed.positions.clamp(min=0)[:, None])[:, -1]
    return draw(replica, sampling, hidden, feed)


def draw(replica: Replica, sampling: Sampling, hidden: Tensor, feed: Feed) -> tuple[Tensor, Tensor]:
    """Tokens drawn [n] int64 after hidden states [n, H], and their log-probs [n] fp32."""
    uniform = uniforms(feed.seeds, feed.draws, feed.samples, feed.counts)
    return sample_tokens(
        hidden, replica.head, sampling.temperature, uniform, replica.group, sampling.top_k, sampling.top_p
    )


class Recorder(Protocol):
    def record(self, step: Callable[[], None]) -> Callable[[], Any]:
        """Runs `step`, which reads and writes tensors that stay where they are; what is returned does it again."""


class CudaGraphs:
    """Records on a GPU. Recordings share the memory of what they compute on the way, so each result has to be copied
    out before another one runs."""

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

    def __init__(self, replica: Replica, device: torch.device, recorder: Callable[[], Recorder] | None = None):
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
        given = torch.stack(feed)  # of which the tokens may be the last results, which recording writes over
        self._feed[:, :n] = given
        self._feed[Feed._fields.index("positions"), n : size.rows] = -1
        if size not in self._table and not self._record(size, sampling):
            return decode_step(self._replica, sampling, Feed(*given), longest + 1)
        self._table[size]()
        return self._tokens[:n], self._logprobs[:n]

    def _begin(self) -> None:
        self.forget()
        assert self._new_recorder is not None
        self._recorder, self._version = self._new_recorder(), self._replica.cache.version
        rows = self._replica.cache.rows
        self._feed = torch.zeros(len(Feed._fields), rows, dtype=torch.int64, device=self._device)
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=self._device)
        self._logprobs = torch.zeros(rows, device=self._device)

    def _size(self, rows: int, width: int, sampling: Sampling) -> _Size:
        """Powers of two, so that there are few recordings."""
        cache = self._replica.cache
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
        feed = Feed(*self._feed[:, : size.rows])
        tokens, logprobs = self._tokens[: size.rows], self._logprobs[: size.rows]

        def step() -> None:
            results = decode_step(self._replica, sampling, feed, size.width)
            tokens.copy_(results[0])
            logprobs.copy_(results[1])

        start, error = now(self._device), None
        assert self._recorder is not None
        try:
            self._table[size] = self._recorder.record(step)
        except Exception as caught:
            error = caught
        failed = self._replica.group.all_reduce(torch.tensor([float(error is not None)], device=self._device))
        if bool(failed > 0):
            self._give_up(error)
        self.seconds += now(self._device) - start
        return self.records

    def _give_up(self, error: Exception | None) -> None:
        self._new_recorder = None
        self.forget()
        if error is not None or self._replica.group.rank == 0:
            name, why = type(self._replica.model).__name__, "another rank failed" if error is None else one_line(error)
            print(f"gearshift: {name}: decoding goes on without CUDA graphs: {why}", file=sys.stderr)


def _power_of_two(number: int) -> int:
    """The next one that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()
