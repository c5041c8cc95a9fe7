"""The step of decoding: nothing in it waits for a device, and recordings of it draw what it draws."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gearshift.engine import Prompts, Rollouts, Sampling
from gearshift.engine.decoder import CudaGraphs, Decoder, Feed, Recorder, decode_step
from gearshift.engine.distributed import World
from gearshift.engine.flash import flash_kernel
from gearshift.engine.generator import Generator
from gearshift.engine.replica import Replica
from gearshift.engine.tensor_parallel import TensorParallelGroup
from gearshift.errors import SettingError, UserError
from gearshift.kernels import FlashKernel
from tests.engine.recording import Again, Recording, torch_only
from tests.engine.simulated import on_ranks
from tests.kernels.flash import flash_attn_with_kvcache
from tests.models import tiny_config

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
META = torch.device("meta")
VOCABULARY = 131


def replica_of(
    family: str,
    recorder: Callable[[], Recorder] | None = None,
    flash: FlashKernel | None = None,
    world: World = ALONE,
) -> Replica:
    """With random weights, as large as those of `save_tiny`."""
    group = TensorParallelGroup(world, 1)
    replica = Replica(tiny_config(family), group, torch.float32, world.device, recorder, flash)
    rng = torch.Generator().manual_seed(0)
    for parameter in replica.slices.values():
        noise = torch.randn(parameter.shape, generator=rng)
        parameter.copy_(noise * 0.1 + (parameter.dim() == 1))
    return replica


def some_prompts(count: int, seed: int = 0) -> Prompts:
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=rng)
    ids = torch.arange(count)
    tokens = torch.randint(3, VOCABULARY, (count, 12), generator=rng) * (torch.arange(12) < lengths[:, None])
    return Prompts(tokens, lengths, ids, ids + 100, torch.zeros_like(ids))


# --- on a device that is not waited for ------------------------------------------------------------------------------


class NoTransfers(TorchDispatchMode):
    """RuntimeError for an operation that brings something from one device to another, which the host waits for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        seen = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        # A number in a tensor on the host is handed to a kernel as a number.
        if len({x.device for x in seen if x.device.type != "cpu" or x.dim()}) > 1:
            raise RuntimeError(f"{func} moves something between devices")
        return out


def feed_of(rows: Tensor) -> Feed:
    return Feed(rows, rows, rows.float())


def step_without_values(
    family: str, sampling: Sampling, flash: FlashKernel | None = None, ask: Callable[[Tensor], Any] | None = None
) -> tuple[Tensor, Tensor]:
    """A step as on a GPU, but on the meta device, where tensors hold nothing that could be asked for."""
    replica = Replica(tiny_config(family), TensorParallelGroup(ALONE, 1), torch.bfloat16, ALONE.device, flash=flash)
    replica.model.to(META)
    replica.head = replica._head_shard()
    replica.cache.reset(8, 64)
    if ask is not None:
        replica.model.get_input_embeddings().register_forward_hook(
            lambda module, args, out: (ask(args[0][:, 0]), out)[1]
        )
    with torch.no_grad(), NoTransfers():
        return decode_step(replica, sampling, feed_of(torch.empty(6, dtype=torch.int64, device=META)), 32)


WAYS = {
    "plain": Sampling(8, eos_ids=()),
    "greedy": Sampling(8, eos_ids=(), temperature=0.0),
    "truncated": Sampling(8, eos_ids=(), temperature=0.7, top_k=5, top_p=0.9),
}


FAMILIES = ["gemma2", "gemma3_text", "gpt_neox", "phi3", "gpt2", "opt", "gpt_oss"]


@pytest.mark.parametrize(
    ("family", "way"), [*(("llama", way) for way in WAYS), *((name, "plain") for name in FAMILIES)]
)
def test_a_step_asks_a_device_for_no_value(family: str, way: str) -> None:
    tokens, logprobs = step_without_values(family, WAYS[way])
    assert (tokens.device, tokens.dtype, tokens.shape) == (META, torch.int64, (6,))
    assert (logprobs.device, logprobs.dtype, logprobs.shape) == (META, torch.float32, (6,))


def test_a_step_through_flash_attn_asks_for_none_either() -> None:
    def kernel(query: Tensor, keys: Tensor, values: Tensor, cache_seqlens: Tensor, **_: Any) -> Tensor:
        assert cache_seqlens.dtype == torch.int32
        return torch.empty_like(query)

    assert step_without_values("llama", WAYS["plain"], kernel)[0].shape == (6,)


ASKING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.max().item(),
    "bool": lambda x: bool(x[0]),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "list": lambda x: x.tolist(),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.tensor([1, 2]).to(x.device),
}


@pytest.mark.parametrize("way", list(ASKING))
def test_that_it_would_be_seen(way: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        step_without_values("llama", WAYS["plain"], ask=ASKING[way])


# --- recordings ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Recording, "made", 0)
    with torch_only():
        yield


def roll_out(replica: Replica, prompts: Prompts, sampling: Sampling, slots: int | None) -> Rollouts:
    replica.stamp = 0
    return Generator(replica, replica.group.world, slots, 0).generate(prompts, sampling)


def same(one: Rollouts, other: Rollouts) -> None:
    assert torch.equal(one.mask, other.mask)
    assert torch.equal(one.responses, other.responses)
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    ("family", "slots"), [("llama", None), ("llama", 3), ("llama", 1), ("gemma2", 3), ("gpt2", None), ("gpt2", 3)]
)
def test_recordings_draw_what_the_step_draws(recording: None, family: str, slots: int | None) -> None:
    """Over refilled slots, rows that fall away, and cache widths; gpt2 has no position for rows that are not there.
    The weights and the seed may change, as long as they lie where they did."""
    plain, recorded = replica_of(family), replica_of(family, Recording)
    recorded.cache.block = 8
    made = []
    for turn in range(2):
        sampling = Sampling(24, eos_ids=tuple(range(2, 12)), temperature=0.8, seed=turn, top_k=(None, 40)[turn])
        want = roll_out(plain, some_prompts(9, turn), sampling, slots)
        for _ in range(2):
            same(roll_out(recorded, some_prompts(9, turn), sampling, slots), want)
            made.append(Recording.made)
        assert len(set(want.mask.sum(1).tolist())) > 3, "rows must end at different lengths"
        for replica in (plain, recorded):
            for parameter in replica.slices.values():
                parameter.mul_(1.1)
    widths = {size.width for size in recorded.decoder._table}
    rows = {size.rows for size in recorded.decoder._table}
    assert len(widths) >= 2
    assert rows in (({8}, {8, 9}) if slots is None else ({slots},))
    assert made[1::2] == made[::2], "the same prompts again are served by the same recordings"
    assert {size.top_k for size in recorded.decoder._table} == {None, 40}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("family", "slots"), [("llama", None), ("llama", 3), ("gemma2", 3), ("gpt2", None)])
def test_cuda_graphs_draw_what_the_step_draws(family: str, slots: int | None) -> None:
    world = World(0, 1, 0, 1, torch.device("cuda", 0))
    plain, captured = replica_of(family, world=world), replica_of(family, CudaGraphs, world=world)
    captured.cache.block = 8
    for turn in range(2):
        sampling = Sampling(24, eos_ids=tuple(range(2, 12)), temperature=0.8, seed=turn, top_k=(None, 40)[turn])
        want = roll_out(plain, some_prompts(9, turn), sampling, slots)
        for _ in range(2):
            same(roll_out(captured, some_prompts(9, turn), sampling, slots), want)
        for replica in (plain, captured):
            for parameter in replica.slices.values():
                parameter.mul_(1.1)
    assert captured.decoder.records
    assert len(captured.decoder._table) >= 4
    captured.cache.free()
    same(roll_out(captured, some_prompts(4), sampling, slots), roll_out(plain, some_prompts(4), sampling, slots))


def test_recordings_go_when_the_cache_does(recording: None) -> None:
    sampling = Sampling(6, eos_ids=())
    plain, recorded = replica_of("llama"), replica_of("llama", Recording)
    roll_out(recorded, some_prompts(3), sampling, None)
    first = Recording.made
    roll_out(recorded, some_prompts(2), sampling, None)
    assert Recording.made == first, "a smaller call uses the same cache and the same recordings"
    for prompts in (some_prompts(12), some_prompts(12)):
        same(roll_out(recorded, prompts, sampling, None), roll_out(plain, prompts, sampling, None))
    assert {size.rows for size in recorded.decoder._table} == {12}
    recorded.cache.free()
    same(roll_out(recorded, some_prompts(3), sampling, None), roll_out(plain, some_prompts(3), sampling, None))
    assert {size.rows for size in recorded.decoder._table} == {3}


def test_rows_that_are_not_there_write_where_nobody_reads(recording: None) -> None:
    """Free slots keep the prompts that other rows may still copy."""
    recorded = replica_of("llama", Recording)
    recorded.cache.reset(8, 16)
    recorded.cache.begin_prefill(torch.arange(8))
    recorded.hidden(torch.full((8, 5), 7), torch.arange(5).expand(8, 5))
    before = [(keys.clone(), values.clone()) for keys, values in recorded.cache._layers.values()]
    two = torch.tensor([4, 2])
    recorded.decoder.step(Sampling(4, eos_ids=()), feed_of(two), 4)
    for layer, (keys, values) in recorded.cache._layers.items():
        for old, new in zip(before[layer], (keys, values), strict=True):
            changed = (old != new).any(-1).any(1).nonzero().tolist()
            last = recorded.cache.capacity - 1
            assert changed == [[0, 4], [1, 2], *([row, last] for row in range(2, 8))]


class Failing(Recording):
    """From the recording after `works` on, in the middle of it."""

    works = 0

    def record(self, step: Callable[[], None]) -> Callable[[], Any]:
        if Recording.made < self.works:
            return super().record(step)
        step()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


@pytest.mark.parametrize("works", [0, 1, 2])
def test_without_recordings_when_one_cannot_be_made(
    recording: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], works: int
) -> None:
    """The step at which that is found out included, whatever the attempt has written."""
    monkeypatch.setattr(Failing, "works", works)
    replica, plain = replica_of("llama", Failing), replica_of("llama")
    replica.cache.block = 4
    sampling = Sampling(20, eos_ids=())
    for _ in range(2):
        same(roll_out(replica, some_prompts(5), sampling, 2), roll_out(plain, some_prompts(5), sampling, 2))
    assert Recording.made == works
    assert not replica.decoder.records
    assert capsys.readouterr().err == (
        "gearshift: LlamaForCausalLM: decoding goes on without recorded steps: operation not permitted when stream is "
        "capturing\n"
    )


def test_all_ranks_go_on_without_recordings_when_one_fails(
    recording: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else some would replay a sum over the group that the others never start."""

    replicas = [replica_of("llama"), replica_of("llama")]  # not by the threads: accelerate's way is not made for them

    def on(group: Any) -> tuple[bool, bool]:
        replica = replicas[group.rank]
        replica.group = group
        replica.cache.reset(1, 8)
        replica.decoder = Decoder(replica, ALONE.device, Failing if group.rank == 1 else Again)
        monkeypatch.setattr(replica, "hidden", lambda tokens, positions: torch.zeros(len(tokens), 1, 32))
        one = torch.zeros(1, dtype=torch.int64)
        before = replica.decoder.records
        replica.decoder.step(Sampling(4, eos_ids=()), feed_of(one), 0)
        return before, replica.decoder.records

    assert on_ranks(2, on) == [(True, False)] * 2
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.rpartition(": ")[2] for line in lines) == [
        "another rank failed", "operation not permitted when stream is capturing"
    ]  # fmt: skip


@pytest.mark.parametrize("error", [ConnectionError("rank 1 has ended, this one waits for it"), MemoryError()])
def test_what_others_would_be_left_in_the_middle_of_is_not_taken_for_a_step_that_cannot_be_recorded(
    error: Exception,
) -> None:
    class Ends(Again):
        def record(self, step: Callable[[], None]) -> Callable[[], Any]:
            raise error

    one = torch.zeros(1, dtype=torch.int64)
    replica = replica_of("llama", Ends)
    replica.cache.reset(1, 8)
    with pytest.raises(type(error)):
        replica.decoder.step(Sampling(4, eos_ids=()), feed_of(one), 0)


@pytest.mark.parametrize(
    ("family", "more", "says"),
    [
        ("gpt_oss", {}, "attention sinks, as GptOssAttention has: use sdpa"),
        ("deepseek_v3", {}, "keys of 12 numbers with values of 6, as DeepseekV3Attention has: use sdpa"),
        ("qwen3", {"head_dim": 264}, "heads of 264 numbers (256 at most), as Qwen3Attention has: use sdpa"),
    ],
)
def test_what_flash_attn_cannot_do_is_refused(family: str, more: dict[str, Any], says: str) -> None:
    config, group = tiny_config(family, **more), TensorParallelGroup(ALONE, 1)
    with pytest.raises(UserError) as caught:
        Replica(config, group, torch.bfloat16, ALONE.device, flash=flash_attn_with_kvcache)
    assert str(caught.value) == f"rollout.attention: flash-attn does not know {says}"


def test_flash_attn_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a dtype and on a device that it knows."""
    gpu = torch.device("cuda")
    for found, dtype, device, says in (
        (None, torch.bfloat16, gpu, 'flash needs flash-attn: pip install "gearshift[flash]", or use sdpa'),
        (object(), torch.float32, gpu, "flash-attn knows no fp32: set run.dtype to bf16, or use sdpa"),
        (object(), torch.bfloat16, ALONE.device, "flash needs a GPU, and this rank computes on cpu: use sdpa"),
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found)
        with pytest.raises(SettingError) as caught:
            flash_kernel(dtype, device)
        assert str(caught.value) == f"rollout.attention: {says}"
