"""Rollouts: prompts in, sampled answers with their log-probs out.

Letters: B rows, P prompt length, L response length, n rows being decoded.

Rows live in slots. When a row ends, its slot takes the next waiting prompt; when none waits, the rows that are left
move together. Rows with the same prompt share its prefill. Which slot or which neighbours a row has changes nothing in
it (see `sampling`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from gearshift.engine import scoring
from gearshift.engine.batches import Prompts, Rollouts, Rows
from gearshift.engine.counting import count_generation
from gearshift.engine.decoder import Feed, draw
from gearshift.engine.distributed import World
from gearshift.engine.exchange import gather_rows
from gearshift.engine.replica import Replica
from gearshift.engine.room import check_memory, check_positions, position_bytes
from gearshift.engine.sampling import Sampling, uniforms
from gearshift.engine.waiting import Admission, Waiting
from gearshift.errors import UserError

# Longest prefill: bounds the activations of a forward over prompts.
PREFILL_TOKENS = 16_384
# Uniforms that are worked out at a time, in some fifty small operations on int64.
_UNIFORMS = 1 << 16

R = TypeVar("R", bound=Rows)


@dataclass(frozen=True)
class _Asked(Prompts):
    """Prompts, and the most tokens of each answer: `limits [B]` int64."""

    limits: Tensor


class Generator:
    """Generates with the weights of one optimizer step; see `HybridEngine.rollout`.

    Every method is collective over all ranks: each passes its own rows, as many as it has (also none). The ranks of a
    tensor-parallel group pool theirs. All raise RuntimeError when the weights are stale.
    """

    def __init__(self, replica: Replica, world: World, slots: int | None, stamp: tuple[int, bool]):
        self._replica, self._world, self._slots = replica, world, slots
        self._stamp = stamp
        self._open = True

    def close(self) -> None:
        self._open = False

    @torch.no_grad()
    def generate(self, prompts: Prompts, sampling: Sampling, limits: Tensor | None = None) -> Rollouts:
        """Answer this rank's prompts; returns this rank's rows in the same order.

        limits [B]: the most tokens of each answer, where that is fewer than `sampling.max_new_tokens`.
        Raises UserError on every rank, before anything is allocated, when the model lacks positions for some row or
        has fewer tokens than `top_k`, or a rank lacks memory for the keys and values of so many rows at once.
        """
        most = torch.full_like(prompts.lengths, sampling.max_new_tokens)
        limits = most if limits is None else limits.to(most).minimum(most)
        if bool((limits < 1).any()):
            raise ValueError("limits must be at least 1: every answer has a token")
        pooled, own = self._pooled(
            _Asked(prompts.tokens, prompts.lengths, prompts.ids, prompts.draws, prompts.samples, limits)
        )
        vocabulary = self._replica.layout.vocabulary[-1][1]
        if sampling.top_k is not None and sampling.top_k > vocabulary:
            raise UserError(f"rollout.top_k: {sampling.top_k} is more than the model's {vocabulary} tokens")
        slots = min(len(pooled), self._slots or len(pooled))
        self._make_room(slots, int((pooled.lengths + pooled.limits).max()) if len(pooled) else 0)
        answered = _Decoding(self._replica, pooled, sampling, slots).run()
        count_generation(self._replica, answered, slots)
        return answered.select(own)

    @torch.no_grad()
    def logprobs(self, rollouts: Rollouts, temperature: float = 1.0) -> Tensor:
        """Log-probs [B, L] fp32 of this rank's responses, 0 where masked: what `CausalModel.logprobs` gives."""
        pooled, own = self._pooled(rollouts)
        found = scoring.response_logprobs(self._replica, pooled, temperature, PREFILL_TOKENS)
        return found[own, : rollouts.responses.shape[1]]

    @torch.no_grad()
    def against(
        self, reference: Generator, rollouts: Rollouts, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, the reference's log-probs, and the exact KL to it at each response token: [B, L] fp32 each.

        Both are in the rollout gear meanwhile. Raises ValueError when they do not split one vocabulary alike.
        """
        reference._require_current()
        pooled, own = self._pooled(rollouts)
        found = scoring.response_kl(self._replica, reference._replica, pooled, temperature, PREFILL_TOKENS)
        width = rollouts.responses.shape[1]
        logprobs, ref_logprobs, kl = (values[own, :width] for values in found)
        return logprobs, ref_logprobs, kl

    def _require_current(self) -> None:
        if not self._open or self._replica.stamp != self._stamp:
            raise RuntimeError("this generator's weights are stale: use it inside `with policy.rollout()`")

    def _pooled(self, rows: R) -> tuple[R, slice]:
        """The rows of all ranks of this tensor-parallel group, and which of them are this rank's."""
        self._require_current()
        group = self._replica.group
        pooled, counts = gather_rows(rows.to(self._world.device), group.group)
        start = sum(counts[: group.rank])
        return pooled, slice(start, start + counts[group.rank])

    def _make_room(self, slots: int, capacity: int) -> None:
        """A cache for `slots` rows of `capacity` positions. Raises UserError on every rank when some rank has none."""
        replica, cache = self._replica, self._replica.cache
        check_positions(replica.model.config, capacity, self._world)
        rows, columns = max(slots, cache.rows), max(cache.rounded(capacity), cache.capacity)
        # A kept cache of few long rows and a request for many short ones: room for both at once is for neither.
        if rows * columns > slots * cache.rounded(capacity) + cache.rows * cache.capacity:
            cache.free()
            rows, columns = slots, cache.rounded(capacity)
        grows = (rows, columns) != (cache.rows, cache.capacity)
        each = columns * position_bytes(replica.model.config, replica.group.size, replica.head.weight.dtype)
        check_memory(each, rows if grows else 0, cache.held_bytes, self._world)
        cache.reset(slots, capacity)


@dataclass
class _Slots:
    """The rows being decoded: row number, position of the newest token, that token; `longest`: the largest position."""

    rows: Tensor
    positions: Tensor
    tokens: Tensor
    longest: int

    def select(self, keep: Tensor) -> _Slots:
        positions = self.positions[keep]
        return _Slots(self.rows[keep], positions, self.tokens[keep], int(positions.max()) if len(positions) else 0)

    def join(self, other: _Slots) -> _Slots:
        pairs = ((self.rows, other.rows), (self.positions, other.positions), (self.tokens, other.tokens))
        rows, positions, tokens = (torch.cat(pair) for pair in pairs)
        return _Slots(rows, positions, tokens, max(self.longest, other.longest))


class _Decoding:
    """One call of `generate`: the answers so far and the slots that work on them."""

    def __init__(self, replica: Replica, prompts: _Asked, sampling: Sampling, slots: int):
        self.replica, self.prompts, self.sampling, self.slot_count = replica, prompts, sampling, slots
        total, device = len(prompts), prompts.tokens.device
        self.responses = torch.zeros(total, sampling.max_new_tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(total, sampling.max_new_tokens, dtype=torch.float32, device=device)
        self.uniforms = torch.empty_like(self.logprobs)  # one for each token that may be drawn
        counts = torch.arange(sampling.max_new_tokens, device=device)
        for part in torch.arange(total, device=device).split(max(1, _UNIFORMS // sampling.max_new_tokens)):
            draws, samples = prompts.draws[part, None], prompts.samples[part, None]
            self.uniforms[part] = uniforms(sampling.seed, draws, samples, counts)
        self.counts = torch.zeros(total, dtype=torch.int64, device=device)
        self.finished = torch.zeros(total, dtype=torch.bool, device=device)
        self.eos = torch.tensor(sampling.eos_ids, dtype=torch.int64, device=device)
        self.waiting = Waiting(prompts, PREFILL_TOKENS)
        self.contents = [-1] * slots  # the prompt whose keys and values each slot holds, working or not
        # Hidden states [H] at the ends of the prompts that rows still wait to share.
        self.ends: dict[int, Tensor] = {}

    def run(self) -> Rollouts:
        empty = self.counts[:0]
        slots = self._fill(_Slots(empty, empty, empty, 0))
        while len(slots.rows):
            slots = self._step(slots)
        return self._rollouts()

    def _step(self, slots: _Slots) -> _Slots:
        """A token more for every slot, then refill or drop the slots that ended."""
        counts = self.counts[slots.rows]
        feed = Feed(slots.tokens, slots.positions, self.uniforms[slots.rows, counts])
        tokens, logprobs = self.replica.decoder.step(self.sampling, feed, slots.longest)
        slots = _Slots(slots.rows, slots.positions + 1, tokens, slots.longest + 1)
        running = self._keep(slots, logprobs, counts)
        if bool(running.all()):
            return slots
        return self._fill(self._drop(slots, running))

    def _keep(self, slots: _Slots, logprobs: Tensor, counts: Tensor) -> Tensor:
        """Into the answers, of `counts [n]` tokens so far, go the slots' new tokens; which slots go on [n] bool."""
        rows = slots.rows
        self.responses[rows, counts] = slots.tokens
        self.logprobs[rows, counts] = logprobs
        self.counts[rows] = counts + 1
        ended = torch.isin(slots.tokens, self.eos)
        if self.sampling.stop is not None:
            ended |= self.sampling.stop.completed(self.responses, rows, counts + 1)
        self.finished[rows] = ended
        return ~ended & (counts + 1 < self.prompts.limits[rows])

    def _drop(self, slots: _Slots, running: Tensor) -> _Slots:
        """Bring the running rows together at the front: rows from the end move into the gaps, the rest stay."""
        order = running.nonzero()[:, 0]
        gaps = (~running[: len(order)]).nonzero()[:, 0]
        if len(gaps):
            movers = order[-len(gaps) :]
            self.replica.cache.move(movers, gaps)
            for mover, gap in zip(movers.tolist(), gaps.tolist(), strict=True):
                self.contents[gap] = self.contents[mover]
            stay = torch.arange(len(order), device=order.device)
            stay[gaps] = movers
            order = stay
        return slots.select(order)

    def _fill(self, slots: _Slots) -> _Slots:
        """Give waiting rows the free slots, until all slots work or nothing waits."""
        while len(self.waiting) and len(slots.rows) < self.slot_count:
            admitted = self.waiting.take(self.contents, len(slots.rows))
            new, running = self._admit(admitted, len(slots.rows))
            if bool(running.all()):
                slots = slots.join(new)
            else:  # an answer of one token: its slot is free again
                slots = self._drop(slots.join(new), torch.cat([torch.ones_like(slots.rows, dtype=torch.bool), running]))
        return slots

    def _admit(self, new: Admission, first_slot: int) -> tuple[_Slots, Tensor]:
        """The prompts of new rows into slots from `first_slot`: these with their first tokens, and which go on [n]."""
        admitted = [*new.readers, *new.copies]
        rows = torch.tensor(admitted, device=self.counts.device)
        lengths, read = self.prompts.lengths[rows], len(new.readers)
        prompts = [self.waiting.prompt_of[row] for row in admitted]
        if read:
            self.ends |= dict(zip(prompts[:read], self._prefill(rows[:read], first_slot), strict=True))
        hidden = torch.stack([self.ends[prompt] for prompt in prompts])
        self.ends = {prompt: end for prompt, end in self.ends.items() if self.waiting.left[prompt]}
        self.contents[first_slot : first_slot + len(admitted)] = prompts
        if new.copies:
            targets = torch.arange(first_slot + read, first_slot + len(admitted), device=rows.device)
            sources = torch.tensor(new.sources, device=rows.device)
            self.replica.cache.move(sources, targets, int(lengths[read:].max()))
        slots = _Slots(rows, lengths, lengths, int(lengths.max()))
        counts = self.counts[rows]
        tokens, logprobs = draw(self.replica, self.sampling, hidden, self.uniforms[rows, counts])
        slots = dataclasses.replace(slots, tokens=tokens)
        return slots, self._keep(slots, logprobs, counts)

    def _prefill(self, rows: Tensor, first_slot: int) -> Tensor:
        """Whole prompts into slots from `first_slot`: hidden states [n, H] at their ends."""
        lengths = self.prompts.lengths[rows]
        width = int(lengths.max())
        self.replica.cache.begin_prefill(torch.arange(first_slot, first_slot + len(rows), device=rows.device))
        positions = torch.arange(width, device=rows.device).expand(len(rows), width)
        hidden = self.replica.hidden(self.prompts.tokens[rows, :width], positions)
        return hidden[torch.arange(len(rows), device=rows.device), lengths - 1]

    def _rollouts(self) -> Rollouts:
        longest = max(1, int(self.counts.max())) if len(self.counts) else 1
        mask = torch.arange(longest, device=self.counts.device) < self.counts[:, None]
        p = self.prompts
        return Rollouts(
            p.tokens, p.lengths, p.ids, p.draws, p.samples,
            self.responses[:, :longest], self.logprobs[:, :longest], mask, self.finished,
        )  # fmt: skip
