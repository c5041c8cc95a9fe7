"""`ppo_targets` on GPUs, in at most three launches.

1. One program per sequence: rewards, KL, advantages (a scan from the end, block by block), returns, and the count,
   mean and sum of squared deviations of its advantages.
2. If whitening: one program merges the sequences' moments, in their order. Between ranks, an all-gather follows.
3. Whitening, which merges the ranks' moments first.

All arithmetic is in fp64, a few operations for each element that is read; the KL and the advantages are rounded to what
is stored before later steps go on from them. No atomics: the same bits every time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels have no types of Python: Triton takes those of the call.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gearshift.kernels import checks
from gearshift.kernels.losses_triton import log_ratio
from gearshift.kernels.moments import WHITEN_EPSILON, gather
from gearshift.kernels.ppo_targets import Targets
from gearshift.kernels.triton_launch import TYPES, Form, Launch

EPSILON = tl.constexpr(WHITEN_EPSILON)


@triton.jit
def add_later(decay_later, sum_later, decay, term):
    """Σ decay^j · term over a stretch of tokens, from those of its two halves; also decay^(its length)."""
    return decay_later * decay, term + decay * sum_later


@triton.jit
def targets_kernel(
    logprobs, ref_logprobs, given, values, mask, scores, rewards, kls, advantages, returns, moments, length,
    kl_coef: tl.float64, gamma: tl.float64, decay: tl.float64, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence, the last block first. `decay` is γλ; ESTIMATOR "given" reads the KL from `given`."""
    row = tl.program_id(0).to(tl.int64)
    start = row * length
    score = tl.load(scores + row).to(tl.float64)
    later = tl.full((), 0.0, tl.float64)  # the advantage just past this block
    count = tl.full((), 0.0, tl.float64)
    mean = tl.full((), 0.0, tl.float64)
    m2 = tl.full((), 0.0, tl.float64)
    blocks = tl.cdiv(length, BLOCK)
    for done in range(blocks):
        first = (blocks - 1 - done) * BLOCK
        column = first + tl.arange(0, BLOCK)
        at = start + column
        inside = column < length
        live = tl.load(mask + at, mask=inside, other=0) != 0
        more = tl.load(mask + at + 1, mask=column + 1 < length, other=0) != 0
        before = tl.load(mask + at - 1, mask=inside & (column > 0), other=1) != 0
        if ESTIMATOR == "given":
            kl = tl.load(given + at, mask=live, other=0.0).to(tl.float64)
        else:
            new = tl.load(logprobs + at, mask=live, other=0.0).to(tl.float64)
            ref = tl.load(ref_logprobs + at, mask=live, other=0.0).to(tl.float64)
            ratio = log_ratio(new, ref)
            if ESTIMATOR == "k1":
                kl = ratio
            elif ESTIMATOR == "k2":
                kl = 0.5 * ratio * ratio
            else:
                kl = tl.exp(-ratio) - 1.0 + ratio
        kl = kl.to(kls.dtype.element_ty)
        # Without a penalty an infinite KL costs nothing (0·inf would be NaN).
        penalty = tl.where(kl_coef == 0.0, 0.0, kl.to(tl.float64) * -kl_coef)
        reward = penalty + tl.where(live & (more == 0), score, 0.0)
        value = tl.load(values + at, mask=live, other=0.0).to(tl.float64)
        next_value = tl.load(values + at + 1, mask=more, other=0.0).to(tl.float64)
        delta = tl.where(live, reward + gamma * next_value - value, 0.0)
        # A response token after a masked one is an error on the CPU. Telling the host would make it wait on every
        # call, so here the sequence's advantages come out as NaN, which stops training before the next step.
        delta = tl.where(live & (before == 0), float("nan"), delta)
        decays = tl.full((BLOCK,), decay, tl.float64)
        decays, sums = tl.associative_scan((decays, delta), 0, add_later, reverse=True)
        advantage = tl.where(live, sums + decays * later, 0.0)
        later = tl.sum(tl.where(column == first, advantage, 0.0), 0)
        tl.store(rewards + at, reward.to(rewards.dtype.element_ty), mask=inside)
        tl.store(kls + at, kl, mask=inside)
        stored = advantage.to(advantages.dtype.element_ty)
        tl.store(advantages + at, stored, mask=inside)
        tl.store(returns + at, tl.where(live, advantage + value, 0.0).to(returns.dtype.element_ty), mask=inside)
        # Moments of what is whitened later: the advantages as they are stored.
        advantage = stored.to(tl.float64)
        here = tl.sum(live.to(tl.float64), 0)
        own = tl.sum(advantage, 0) / tl.maximum(here, 1.0)
        off = tl.where(live, advantage - own, 0.0)
        share = here / tl.maximum(count + here, 1.0)
        gap = own - mean
        m2 += tl.sum(off * off, 0) + gap * gap * count * share
        mean += gap * share
        count += here
    tl.store(moments + row * 3, count)
    tl.store(moments + row * 3 + 1, mean)
    tl.store(moments + row * 3 + 2, m2)


@triton.jit
def merged(moments, groups, GROUPS: tl.constexpr):
    """Count, mean and sum of squared deviations of all groups of `moments [groups, 3]` together, in their order."""
    counts = tl.zeros((GROUPS,), tl.float64)
    sums = tl.zeros((GROUPS,), tl.float64)
    m2s = tl.zeros((GROUPS,), tl.float64)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        count = tl.load(moments + group * 3, mask=group < groups, other=0.0)
        counts += count
        sums += count * tl.load(moments + group * 3 + 1, mask=group < groups, other=0.0)
    total = tl.sum(counts, 0)
    mean = tl.sum(sums, 0) / tl.maximum(total, 1.0)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        count = tl.load(moments + group * 3, mask=group < groups, other=0.0)
        gap = tl.load(moments + group * 3 + 1, mask=group < groups, other=0.0) - mean
        m2s += tl.load(moments + group * 3 + 2, mask=group < groups, other=0.0) + count * gap * gap
    return total, mean, tl.sum(m2s, 0)


@triton.jit
def merge_kernel(moments, merged_moments, groups, GROUPS: tl.constexpr):
    count, mean, m2 = merged(moments, groups, GROUPS)
    tl.store(merged_moments, count)
    tl.store(merged_moments + 1, mean)
    tl.store(merged_moments + 2, m2)


@triton.jit
def whiten_kernel(advantages, mask, moments, groups, elements, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """In place."""
    count, mean, m2 = merged(moments, groups, GROUPS)
    deviation = tl.sqrt(m2 / tl.maximum(count, 1.0) + EPSILON)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    live = tl.load(mask + at, mask=inside, other=0) != 0
    advantage = tl.load(advantages + at, mask=live, other=0.0).to(tl.float64)
    whitened = tl.where(live, (advantage - mean) / deviation, 0.0)
    tl.store(advantages + at, whitened.to(advantages.dtype.element_ty), mask=inside)


# By the block's length, the shortest first: a sequence takes the first that holds it, or the last several times.
ROWS = [
    Launch(targets_kernel, {"BLOCK": block}, num_warps=num_warps)
    for block, num_warps in ((128, 1), (512, 4), (2048, 8))
]
MERGE = Launch(merge_kernel, {"GROUPS": 512}, num_warps=4)
WHITEN = Launch(whiten_kernel, {"GROUPS": 32, "BLOCK": 1024}, num_warps=4)


def ppo_targets(
    logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, scores: Tensor, kl: Tensor | None,
    kl_coef: float, estimator: str, gamma: float, lam: float, whiten: bool, group: str | None,
) -> Targets:  # fmt: skip
    """As `ppo_targets_cpu.ppo_targets`."""
    dtype = checks.accumulation_dtype(logprobs, ref_logprobs, values, scores, kl)
    rows, length = mask.shape
    mask = mask.contiguous()
    found = Targets(*(torch.empty(mask.shape, dtype=dtype, device=mask.device) for _ in Targets._fields))
    moments = torch.empty(rows, 3, dtype=torch.float64, device=mask.device)
    launch = next((one for one in ROWS if one.blocks["BLOCK"] >= length), ROWS[-1])
    # A kernel takes a pointer even where it reads nothing.
    given = logprobs if kl is None else kl.contiguous()
    launch(
        (rows,), logprobs.contiguous(), ref_logprobs.contiguous(), given,
        values.contiguous(), mask, scores.contiguous(), *found, moments, length, kl_coef, gamma, gamma * lam,
        ESTIMATOR=estimator if kl is None else "given",
    )  # fmt: skip
    if whiten:
        whole = torch.empty(1, 3, dtype=torch.float64, device=mask.device)
        MERGE((1,), moments, whole, rows)
        ranks = gather(whole, group)
        elements = mask.numel()
        blocks = triton.cdiv(elements, WHITEN.blocks["BLOCK"])
        WHITEN((blocks,), found.advantages, mask, ranks, ranks.shape[0], elements)
    return found


def forms() -> list[Form]:
    """Every estimator and block length, and every dtype."""
    inputs, results = (
        ("logprobs", "ref_logprobs", "given", "values", "scores"),
        ("rewards", "kls", "advantages", "returns"),
    )
    numbers = {"length": "i32", "kl_coef": "fp64", "gamma": "fp64", "decay": "fp64"}
    shared = {"mask": "*i1", "moments": "*fp64", "groups": "i32"}
    found = []
    for estimator, dtype, launch in [
        ("k1", torch.float32, ROWS[0]), ("k2", torch.bfloat16, ROWS[1]), ("k3", torch.float32, ROWS[2]),
        ("given", torch.float16, ROWS[2]),
    ]:  # fmt: skip
        types = dict.fromkeys(inputs, f"*{TYPES[dtype]}") | dict.fromkeys(results, "*fp32") | numbers | shared
        name = f"ppo_targets {estimator} {TYPES[dtype]} {launch.blocks['BLOCK']}"
        found.append(Form(name, launch, types, {"ESTIMATOR": estimator}))
    found.append(Form("ppo_targets merge", MERGE, shared | {"merged_moments": "*fp64"}))
    found.append(Form("ppo_targets whiten", WHITEN, shared | {"advantages": "*fp32", "elements": "i32"}))
    return found
