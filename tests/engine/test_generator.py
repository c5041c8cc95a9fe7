"""What a generator does besides drawing: shared prompts, stop strings, limits, scoring, and its errors."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.engine import CausalModel, Prompts, Rollouts, Sampling, StopStrings, World
from gearshift.errors import UserError
from tests.engine.test_hybrid import _policy as policy_of
from tests.engine.test_hybrid import some_prompts
from tests.models import save_tiny
from tests.rlhf.tiny import save_policy, tiny_tokenizer
from tests.worker_group import WorkerGroup


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("llama")))


# --- several answers to a prompt -------------------------------------------------------------------------------------

ANSWERS = 4
VARIED = Sampling(20, eos_ids=tuple(range(2, 12)), seed=7)


def answers_of(prompts: Prompts) -> Prompts:
    """Every prompt ANSWERS times, not side by side."""
    row = torch.arange(len(prompts)).repeat(ANSWERS)
    return dataclasses.replace(prompts.select(row), samples=torch.arange(ANSWERS).repeat_interleave(len(prompts)))


def share_prompts(world: World, folder: str, tp_size: int, slots: int | None) -> dict[str, Any]:
    """Answers to shared prompts in one call, and one answer at a time; and how many prompts each way read."""
    policy = policy_of(world, folder, tp_size, slots=slots)
    every = answers_of(some_prompts(5))
    mine = every.select(slice(world.rank, None, world.size))
    with policy.rollout() as generator:
        read: list[int] = []
        begin = policy._replica.cache.begin_prefill  # type: ignore[union-attr]
        policy._replica.cache.begin_prefill = lambda rows: (read.append(len(rows)), begin(rows))  # type: ignore
        together = generator.generate(mine, VARIED)
        shared, read[:] = sum(read), []
        apart = [generator.generate(mine.select(mine.samples == k), VARIED) for k in range(ANSWERS)]
    return {"together": together, "apart": apart, "shared": shared, "read": sum(read)}


@pytest.mark.parametrize(("tp_size", "slots"), [(1, None), (2, None), (1, 3), (2, 6), (2, 1)])
def test_answers_to_a_prompt_share_its_reading(
    two_ranks: WorkerGroup, llama: str, tp_size: int, slots: int | None
) -> None:
    for found in two_ranks.run(share_prompts, llama, tp_size, slots):
        together = found["together"]
        for k, alone in enumerate(found["apart"]):
            rows = together.select(together.samples == k)
            assert torch.equal(rows.ids, alone.ids)
            width = alone.responses.shape[1]
            assert torch.equal(rows.mask[:, :width], alone.mask)
            assert torch.equal(rows.responses[:, :width], alone.responses)
            torch.testing.assert_close(rows.logprobs[:, :width], alone.logprobs, atol=2e-6, rtol=0)
        assert len({tuple(row.tolist()) for row in together.responses}) > len(together) // 2
        # Of 20 rows of 5 prompts over both ranks: a replica of one rank has 10 of them, of all 5 prompts.
        assert found["read"] == (10 if tp_size == 1 else 20)
        # A slot that is filled by a row from the end may have been the last to hold its prompt.
        assert found["shared"] == 5 or (slots in (3, 6) and found["shared"] == 6)


# --- ends ------------------------------------------------------------------------------------------------------------

STOPS = ["e", "th", " on"]


def stop_at(world: World, folder: str, tp_size: int, slots: int | None, strings: list[str]) -> Rollouts:
    policy = policy_of(world, folder, tp_size, slots=slots)
    stop = StopStrings(tiny_tokenizer(), strings) if strings else None
    mine = some_prompts(24, vocabulary=261).select(world.share(24))
    with policy.rollout() as generator:
        return generator.generate(mine, Sampling(40, eos_ids=(0,), seed=3, stop=stop))


def test_stop_strings_end_answers_where_their_text_holds_one(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    """The same tokens as without them, up to the one that completes one; whatever the replicas and the slots."""
    folder = str(save_policy(tmp_path / "policy"))
    tokenizer = tiny_tokenizer()
    free = two_ranks.run(stop_at, folder, 2, None, [])
    stopped = 0
    for tp_size, slots in [(2, None), (2, 3), (1, 4)]:
        for plain, part in zip(free, two_ranks.run(stop_at, folder, tp_size, slots, STOPS), strict=True):
            for b in range(len(part)):
                whole = plain.responses[b][plain.mask[b]].tolist()
                texts = [tokenizer.decode(whole[:n]) for n in range(1, len(whole) + 1)]
                hit = next((n for n, text in enumerate(texts, 1) if any(s in text for s in STOPS)), None)
                assert part.responses[b][part.mask[b]].tolist() == whole[:hit]
                assert bool(part.finished[b]) == (hit is not None or bool(plain.finished[b]))
                stopped += hit is not None and hit < len(whole)
    assert stopped > 3 * 4, "some answers must end at a stop string for this to mean anything"


def cut(world: World, folder: str, tp_size: int, slots: int | None) -> Rollouts:
    policy = policy_of(world, folder, tp_size, slots=slots)
    mine = some_prompts(12).select(world.share(12))
    with policy.rollout() as generator:
        return generator.generate(mine, Sampling(16, (2,), temperature=1.3, seed=4, top_k=20, top_p=0.9))


def test_truncated_draws_are_the_same_on_one_rank_and_two(two_ranks: WorkerGroup, llama: str) -> None:
    first, *others = [two_ranks.run(cut, llama, tp_size, slots) for tp_size, slots in [(1, None), (2, None), (2, 3)]]
    for parts in others:
        for one, other in zip(first, parts, strict=True):
            assert torch.equal(one.responses, other.responses)
            torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=0)


def limited(world: World, folder: str, tp_size: int) -> tuple[Rollouts, Rollouts, str]:
    policy = policy_of(world, folder, tp_size, slots=3)
    mine = some_prompts(9).select(world.share(9))
    with policy.rollout() as generator:
        whole = generator.generate(mine, Sampling(12, eos_ids=(), seed=2))
        some = generator.generate(mine, Sampling(12, eos_ids=(), seed=2), mine.ids * 2 + 1)
        try:
            generator.generate(mine, Sampling(12, eos_ids=()), mine.ids * 0)
        except ValueError as error:
            return whole, some, str(error)
    return whole, some, "no answer has no token"


@pytest.mark.parametrize("tp_size", [1, 2])
def test_limits_cut_answers_one_by_one(two_ranks: WorkerGroup, llama: str, tp_size: int) -> None:
    for whole, some, error in two_ranks.run(limited, llama, tp_size):
        assert whole.mask.sum(1).tolist() == [12] * len(whole)
        assert some.mask.sum(1).tolist() == (some.ids * 2 + 1).clamp(max=12).tolist()
        width = some.responses.shape[1]
        assert torch.equal(some.responses, whole.responses[:, :width] * some.mask)
        assert not some.finished.any()
        assert "at least 1" in error


# --- scoring ---------------------------------------------------------------------------------------------------------


def mixed_rollouts(world: World, vocabulary: int = 131) -> Rollouts:
    """This rank's rows, not sampled by any model: other lengths, and responses of every token."""
    rows = 5 + 2 * world.rank
    g = torch.Generator().manual_seed(world.rank)
    prompts = some_prompts(rows, seed=world.rank)
    mask = torch.arange(9 + world.rank) < torch.randint(1, 10, (rows, 1), generator=g)
    responses = torch.randint(vocabulary, mask.shape, generator=g) * mask
    fields = {f.name: getattr(prompts, f.name) for f in dataclasses.fields(prompts)}
    return Rollouts(**fields, responses=responses, logprobs=mask.float(), mask=mask, finished=mask[:, 0])


def score(world: World, folder: str, tp_size: int) -> dict[str, Any]:
    from gearshift.engine import generator as module

    policy = policy_of(world, folder, tp_size)
    rollouts = mixed_rollouts(world)
    found: dict[str, Any] = {"mask": rollouts.mask}
    with policy.rollout() as generator:
        for temperature in (1.0, 0.6):
            own = generator.logprobs(rollouts, temperature)
            found.setdefault("pairs", []).append((own, policy.logprobs(rollouts, temperature)))
        usual, module.PREFILL_TOKENS = module.PREFILL_TOKENS, 40
        found["in_parts"] = (generator.logprobs(rollouts), found["pairs"][0][0])
        module.PREFILL_TOKENS = usual
        found["cache"] = policy._replica.cache.held_bytes  # type: ignore[union-attr]
        generator.generate(some_prompts(2), Sampling(4, eos_ids=()))
        held = policy._replica.cache.held_bytes  # type: ignore[union-attr]
        generator.logprobs(rollouts)
        found["grown"] = policy._replica.cache.held_bytes - held  # type: ignore[union-attr]
        none = generator.logprobs(rollouts.select(slice(0, len(rollouts) * world.rank)))
        found["some"] = (none, own.new_zeros(0, own.shape[1]) if world.rank == 0 else found["pairs"][0][0])
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "cohere", "granite"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_logprobs_are_those_of_the_training_forward(
    two_ranks: WorkerGroup, tmp_path: Path, family: str, tp_size: int
) -> None:
    """In fp32 within 1e-5, for a head bias, scaled logits and a tied head too; a rank may bring nothing."""
    folder = str(save_tiny(family, tmp_path / family))
    for found in two_ranks.run(score, folder, tp_size):
        for own, trained in (*found["pairs"], found["in_parts"], found["some"]):
            assert own.shape == trained.shape
            torch.testing.assert_close(own, trained, atol=1e-5, rtol=0)
        assert not found["pairs"][0][0][~found["mask"]].any()
        assert found["cache"] == 0
        assert found["grown"] == 0


def hold_against(world: World, folder: str, other: str, tp_size: int) -> list[tuple[Tensor, ...]]:
    policy, reference = policy_of(world, folder, tp_size), policy_of(world, other, tp_size)
    rollouts = mixed_rollouts(world)
    with policy.rollout() as generator, reference.rollout() as held_against:
        own = generator.against(held_against, rollouts, 0.8)
    frozen = CausalModel.load(other, world, dtype=torch.float32, micro_batch_size=3)
    return list(zip(own, policy.against(frozen, rollouts, 0.8), strict=True))


@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_exact_kl_of_two_replicas(two_ranks: WorkerGroup, llama: str, tmp_path: Path, tp_size: int) -> None:
    """As between two models under ZeRO-3; the reference has another hidden size and another head."""
    other = str(save_tiny("cohere", tmp_path / "cohere", seed=1, hidden_size=48))
    for pairs in two_ranks.run(hold_against, llama, other, tp_size):
        for own, expected in pairs:
            torch.testing.assert_close(own, expected, atol=2e-5, rtol=1e-5)
        assert pairs[2][0].max() > 0.1


def two_layouts(world: World, folder: str) -> str:
    policy, reference = policy_of(world, folder, 1), policy_of(world, folder, 2)
    with policy.rollout() as generator, reference.rollout() as held_against:
        try:
            generator.against(held_against, mixed_rollouts(world))
        except ValueError as error:
            return str(error)
    return "compared a whole head with a part of one"


def test_replicas_of_other_layouts_are_not_compared(two_ranks: WorkerGroup, llama: str) -> None:
    for error in two_ranks.run(two_layouts, llama):
        assert error == "both models must have the same vocabulary and the same tensor-parallel size"


# --- errors ----------------------------------------------------------------------------------------------------------


def fail_to_generate(world: World, folder: str, tp_size: int, slots: int | None, sampling: Sampling) -> tuple[str, int]:
    """The error of prompts of which only rank 1 has a long one; then the group still works. And what the cache held."""
    policy = policy_of(world, folder, tp_size, slots=slots)
    mine = some_prompts(6).select(world.share(6))
    if world.rank == 1:
        long = torch.full((1, 60), 5)
        mine = Prompts(long, torch.tensor([60]), mine.ids[:1], mine.draws[:1], mine.samples[:1])
    with policy.rollout() as generator:
        try:
            generator.generate(mine, sampling)
        except UserError as error:
            held = policy._replica.cache.held_bytes  # type: ignore[union-attr]
            assert generator.generate(mine, Sampling(3, eos_ids=())).mask.sum() == 3 * len(mine)
            return str(error), held
    return "generated", -1


@pytest.mark.parametrize("tp_size", [1, 2])
def test_more_positions_than_the_model_has(two_ranks: WorkerGroup, llama: str, tp_size: int) -> None:
    """Every rank tells it, before anything is allocated, though with TP 1 one of them has room."""
    for error, held in two_ranks.run(fail_to_generate, llama, tp_size, None, Sampling(80, eos_ids=())):
        assert error == (
            "rollout.max_new_tokens: a prompt and its answer may take 140 positions, and the model has 128: "
            "lower it by 12, or leave out long prompts (data.max_prompt_tokens)"
        )
        assert held == 0


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_cache_that_cannot_fit(two_ranks: WorkerGroup, tmp_path: Path, tp_size: int) -> None:
    """2 layers, 2 key/value heads of 8 numbers in fp32: 256 bytes a position, 128 with TP 2."""
    folder = str(save_tiny("llama", tmp_path / "llama", max_position_embeddings=2**34))
    each = (60 + 2**32) * (256 // tp_size)
    for error, held in two_ranks.run(fail_to_generate, folder, tp_size, None, Sampling(2**32, eos_ids=())):
        assert error == (
            f"rollout.slots: the memory of a rank does not hold keys and values of {each / 2**20:,.1f} MiB for each "
            "sequence that it is to decode at once; not even one sequence fits, lower rollout.max_new_tokens or raise "
            "rollout.tp_size"
        )
        assert held == 0


def fail_with_little_memory(world: World, folder: str, rows: int, free: list[int]) -> str:
    from gearshift.engine import room

    policy = policy_of(world, folder, 1)
    usual, room.free_bytes = room.free_bytes, lambda world: free[world.rank]
    try:
        with policy.rollout() as generator:
            generator.generate(some_prompts(rows), Sampling(100 - 12, eos_ids=()))
    except UserError as error:
        return str(error)
    finally:
        room.free_bytes = usual
    return "generated"


def test_how_many_sequences_would_fit(two_ranks: WorkerGroup, llama: str) -> None:
    """Rows of 99 positions take 25,344 bytes each, of nine tenths of the free memory; the poorest rank decides."""
    assert int(some_prompts(8).lengths.max()) == 11
    row = 99 * 256
    enough = [int(8.01 * row / 0.9)] * 2
    assert two_ranks.run(fail_with_little_memory, llama, 8, enough) == ["generated"] * 2
    for error in two_ranks.run(fail_with_little_memory, llama, 8, [enough[0], int(3.5 * row / 0.9)]):
        assert error == (
            "rollout.slots: the memory of a rank does not hold keys and values of 0.0 MiB for each sequence that it "
            "is to decode at once; 3 sequences fit: set rollout.slots to that, lower rollout.max_new_tokens or raise "
            "rollout.tp_size"
        )


def test_more_top_k_than_tokens(two_ranks: WorkerGroup, llama: str) -> None:
    for error, _ in two_ranks.run(fail_to_generate, llama, 2, None, Sampling(4, eos_ids=(), top_k=132)):
        assert error == "rollout.top_k: 132 is more than the model's 131 tokens"


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("max_new_tokens", 0, "at least 1"),
        ("temperature", -0.5, "0 (greedy) or above"),
        ("top_k", 0, "at least 1, or None for all tokens"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_p", float("nan"), "above 0 and at most 1"),
    ],
)
def test_settings_out_of_range(field: str, value: Any, right: str) -> None:
    with pytest.raises(UserError) as caught:
        Sampling(**{"max_new_tokens": 8, "eos_ids": (), field: value})
    assert str(caught.value) == f"rollout.{field}: should be {right}, not {value}"
