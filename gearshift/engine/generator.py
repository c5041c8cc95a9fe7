"""Rollouts: prompts in, sampled answers with their log-probs out.

Letters: B rows, P prompt length, L response length, n rows being decoded.

Rows live in slots. When a row ends, its slot takes the next waiting prompt; when none waits, the rows that are left
move together. Which slot or which neighbours a row has changes nothing in it (see `sampling`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gearshift.engine.batches import Prompts, Rollouts
from gearshift.engine.distributed import World
from gearshift.engine.exchange import gather_rows
from gearshift.engine.replica import Replica
from gearshift.engine.sampling import Sampling, sample_tokens, uniforms

# Longest prefill: bounds the activations of a forward over prompts.
PREFILL_TOKENS = 16_384


class Generator:
    """Generates with the weights of one optimizer step; see `HybridEngine.rollout`."""

    def __init__(self, replica: Replica, world: World, slots: int | None, current_step: int):
        self._replica, self._world, self._slots = replica, world, slots
        self._step = current_step
        self._open = True

    def close(self) -> None:
        self._open = False

    @torch.no_grad()
    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollouts:
        """Answer this rank's prompts; returns this rank's rows in the same order. Collective.

        The ranks of a tensor-parallel group pool their prompts. Raises RuntimeError when the weights are stale.
        """
        if not self._open or self._replica.stamp != self._step:
            raise RuntimeError("this generator's weights are stale: generate inside `with policy.rollout()`")
        group = self._replica.group
        pooled, counts = gather_rows(prompts.to(self._world.device), group.group)
        answers = _Decoding(self._replica, pooled, sampling, self._slots).run()
        start = sum(counts[: group.rank])
        return answers.select(slice(start, start + counts[group.rank]))


@dataclass
class _Slots:
    """The rows being decoded: row number, position of the newest token, that token."""

    rows: Tensor
    positions: Tensor
    tokens: Tensor

    def select(self, keep: Tensor) -> _Slots:
        return _Slots(self.rows[keep], self.positions[keep], self.tokens[keep])

    def join(self, other: _Slots) -> _Slots:
        pairs = ((self.rows, other.rows), (self.positions, other.positions), (self.tokens, other.tokens))
        return _Slots(*(torch.cat(pair) for pair in pairs))


class _Decoding:
    """One call of `generate`: the answers so far and the slots that work on them."""

    def __init__(self, replica: Replica, prompts: Prompts, sampling: Sampling, slots: int | None):
        self.replica, self.prompts, self.sampling = replica, prompts, sampling
        total, device = len(prompts), prompts.tokens.device
        self.slot_count = min(total, slots or total)
        self.responses = torch.zeros(total, sampling.max_new_tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(total, sampling.max_new_tokens, dtype=torch.float32, device=device)
        self.counts = torch.zeros(total, dtype=torch.int64, device=device)
        self.finished = torch.zeros(total, dtype=torch.bool, device=device)
        self.eos = torch.tensor(sampling.eos_ids, dtype=torch.int64, device=device)
        # Longest first: rows of like length are prefilled together.
        self.waiting = prompts.lengths.argsort(descending=True, stable=True)

    def run(self) -> Rollouts:
        longest = int(self.prompts.lengths.max()) if len(self.prompts) else 0
        self.replica.cache.reset(self.slot_count, longest + self.sampling.max_new_tokens)
        empty = self.waiting[:0]
        slots = self._fill(_Slots(empty, empty, empty))
        while len(slots.rows):
            hidden = self._decode(slots)
            slots = self._record(_Slots(slots.rows, slots.positions + 1, slots.tokens), hidden)
        return self._rollouts()

    def _decode(self, slots: _Slots) -> Tensor:
        """One forward over the newest token of every slot: hidden states [n, H]."""
        self.replica.cache.begin_decode(slots.positions)
        return self.replica.hidden(slots.tokens[:, None], slots.positions[:, None])[:, -1]

    def _record(self, slots: _Slots, hidden: Tensor) -> _Slots:
        """Sample a token for every slot, then refill or drop the slots that ended."""
        slots, running = self._sample(slots, hidden)
        if bool(running.all()):
            return slots
        return self._fill(self._drop(slots, running))

    def _sample(self, slots: _Slots, hidden: Tensor) -> tuple[_Slots, Tensor]:
        """The slots with their new tokens (whose position `slots.positions` already is), and which go on [n] bool."""
        rows, s = slots.rows, self.sampling
        count = self.counts[rows]
        uniform = uniforms(s.seed, self.prompts.draws[rows], self.prompts.samples[rows], count)
        tokens, logprobs = sample_tokens(hidden, self.replica.head, s.temperature, uniform, self.replica.group)
        self.responses[rows, count] = tokens
        self.logprobs[rows, count] = logprobs
        self.counts[rows] = count + 1
        ended = torch.isin(tokens, self.eos)
        self.finished[rows] = ended
        return _Slots(rows, slots.positions, tokens), ~ended & (count + 1 < s.max_new_tokens)

    def _drop(self, slots: _Slots, running: Tensor) -> _Slots:
        """Bring the running rows together at the front: rows from the end move into the gaps, the rest stay."""
        order = running.nonzero()[:, 0]
        gaps = (~running[: len(order)]).nonzero()[:, 0]
        if len(gaps):
            movers = order[-len(gaps) :]
            self.replica.cache.move(movers, gaps)
            stay = torch.arange(len(order), device=order.device)
            stay[gaps] = movers
            order = stay
        return slots.select(order)

    def _fill(self, slots: _Slots) -> _Slots:
        """Prefill waiting prompts into the free slots, until all slots work or nothing waits."""
        while len(self.waiting) and len(slots.rows) < self.slot_count:
            free = self.slot_count - len(slots.rows)
            width = int(self.prompts.lengths[self.waiting[0]])
            take = min(free, max(1, PREFILL_TOKENS // width))
            rows, self.waiting = self.waiting[:take], self.waiting[take:]
            new, running = self._sample(*self._prefill(rows, len(slots.rows), width))
            if bool(running.all()):
                slots = slots.join(new)
            else:  # an answer of one token: its slot is free again
                slots = self._drop(slots.join(new), torch.cat([torch.ones_like(slots.rows, dtype=torch.bool), running]))
        return slots

    def _prefill(self, rows: Tensor, first_slot: int, width: int) -> tuple[_Slots, Tensor]:
        """Whole prompts into slots from `first_slot`: the slots, and hidden states [n, H] at the prompts' ends."""
        lengths = self.prompts.lengths[rows]
        self.replica.cache.begin_prefill(torch.arange(first_slot, first_slot + len(rows), device=rows.device))
        positions = torch.arange(width, device=rows.device).expand(len(rows), width)
        hidden = self.replica.hidden(self.prompts.tokens[rows, :width], positions)
        last = hidden[torch.arange(len(rows), device=rows.device), lengths - 1]
        return _Slots(rows, lengths, lengths), last

    def _rollouts(self) -> Rollouts:
        longest = max(1, int(self.counts.max())) if len(self.counts) else 1
        mask = torch.arange(longest, device=self.counts.device) < self.counts[:, None]
        p = self.prompts
        return Rollouts(
            p.tokens, p.lengths, p.ids, p.draws, p.samples,
            self.responses[:, :longest], self.logprobs[:, :longest], mask, self.finished,
        )  # fmt: skip
