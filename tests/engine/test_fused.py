"""Which modules of which families compute in one pass, and that logits and gradients stay what they were."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gearshift.engine import CausalModel, TokenBatch, Training, World
from gearshift.engine import fused as engine_fused
from gearshift.engine.fused import bind_fused, bind_norm, bind_swiglu
from gearshift.engine.zero import compute_activations_again
from gearshift.kernels import Loss
from tests.models import save_tiny, tiny_config
from tests.worker_group import WorkerGroup

CPU = torch.device("cpu")
ROTARY = "apply_rotary_pos_emb"
# Of two layers each: norms, feed-forward blocks, and whether rotary embeddings are.
BOUND = {
    "llama": (5, 2, True),
    "mistral": (5, 2, True),
    "qwen2": (5, 2, True),
    "qwen3": (9, 2, True),  # norms of queries and keys
    "qwen2_moe": (5, 2, True),  # the shared expert
    "gemma2": (9, 0, True),  # GELU
    "phi3": (5, 0, True),  # gate and up in one projection
    "olmo2": (9, 2, True),
    "cohere": (0, 2, False),  # layer norms, and rotary embeddings of neighbours
    "gpt_neox": (0, 0, True),
    "opt": (0, 0, False),
}


@pytest.fixture(autouse=True)
def _model_files_as_they_were() -> Iterator[None]:
    """The rotary embedding is replaced in the model's file, for the process."""
    yield
    for name, module in list(sys.modules.items()):
        own = getattr(vars(module).get(ROTARY), "own", None) if name.startswith("transformers.models.") else None
        if own is not None:
            setattr(module, ROTARY, own)


def tiny(family: str, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def bound(model: Any) -> tuple[int, int, bool]:
    """Norms, feed-forward blocks, rotary embeddings: what computes in one pass."""
    own = [
        m for m in model.modules() if "forward" in vars(m) and vars(m)["forward"].__module__ == engine_fused.__name__
    ]
    rotary = getattr(sys.modules[type(model).__module__], ROTARY, None)
    return sum(hasattr(m, "weight") for m in own), sum(hasattr(m, "up_proj") for m in own), hasattr(rotary, "own")


def passes(model: Any) -> dict[str, Tensor]:
    """Logits and gradients."""
    tokens = torch.arange(2 * 11).view(2, 11) * 31 % 131
    model.zero_grad()
    logits = model(tokens).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
    return {"logits": logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        assert float((found[name] - want).abs().max()) <= 1e-5 * float(want.abs().max().clamp(min=1e-3)), name


@pytest.mark.parametrize("family", BOUND)
def test_what_is_bound_computes_the_same(family: str) -> None:
    model = tiny(family)
    wanted, state = passes(model), torch.get_rng_state()
    weights = copy.deepcopy(model.state_dict())
    bind_fused(model, CPU)
    assert bound(model) == BOUND[family]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    same(passes(model), wanted)


@pytest.mark.parametrize("how", ["gpu", "bf16"])
def test_only_fp32_on_a_processor(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    monkeypatch.setattr(engine_fused, "bind_norm", lambda module: pytest.fail("tried"))
    if how == "bf16":
        model.bfloat16()
    bind_fused(model, torch.device("cuda") if how == "gpu" else CPU)
    assert bound(model) == (0, 0, False)


def test_layers_that_compute_again() -> None:
    model = tiny("qwen3").train()
    wanted = passes(model)
    compute_activations_again(model)
    bind_fused(model, CPU)
    same(passes(model), wanted)


def test_adapters() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny("llama")
    targets = ["gate_proj", "down_proj", "q_proj"]
    inject_adapter_in_model(LoraConfig(target_modules=targets, init_lora_weights=False), model, "default")
    wanted = passes(model)
    assert any("lora_A" in name for name in wanted)
    bind_fused(model, CPU)
    assert bound(model) == BOUND["llama"]
    same(passes(model), wanted)


def test_a_single_position_keeps_the_file_s_own() -> None:
    """Steps of decoding join it by themselves, where they are recorded."""
    model = tiny("llama")
    bind_fused(model, CPU)
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(torch.tensor([[5]]))
    assert "aten::neg" in {event.key for event in profile.key_averages()}


# --- modules that look alike -----------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, act: Any = None):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
        self.act_fn = act or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Clipped(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x))


class Scaled(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class Gated(Mlp):
    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        return super().forward(x) if more is None else more


@pytest.mark.parametrize("kind", [lambda: Mlp(nn.GELU()), Clipped, Gated, lambda: Mlp(nn.Hardswish())])
def test_feed_forward_blocks_that_compute_something_else_stay(kind: Any) -> None:
    block = kind()
    bind_swiglu(block)
    assert "forward" not in vars(block)


@pytest.mark.parametrize("kind", [Mlp, Scaled, lambda: Mlp(torch.nn.functional.silu)])
def test_a_block_is_known_by_what_it_computes(kind: Any) -> None:
    block = kind()
    x = torch.randn(3, 4)
    own = block(x)
    bind_swiglu(block)
    assert "forward" in vars(block)
    assert torch.allclose(block(x), own, atol=1e-6)


def test_projections_are_called_as_modules() -> None:
    """Their hooks are where ZeRO-3 gathers weights."""
    block, called = Mlp(), []
    for name in ("gate_proj", "up_proj", "down_proj"):
        block.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
    bind_swiglu(block)
    assert called == []
    block(torch.randn(3, 4))
    assert called == ["gate_proj", "up_proj", "down_proj"]


class Norm(nn.Module):
    def __init__(self, power: float = 2.0):
        super().__init__()
        self.weight, self.eps, self.power = nn.Parameter(torch.randn(6)), 1e-6, power

    def forward(self, x: Tensor) -> Tensor:
        mean = x.abs().pow(self.power).mean(-1, keepdim=True) + self.eps
        return x * mean.pow(-1 / self.power) * self.weight


def test_a_norm_is_known_without_its_weight() -> None:
    """Which ZeRO-3 has cut, so that its memory is empty; a norm that computes something else, or has a forward of its
    own already, stays."""
    norm, other, taken, layer_norm = Norm(), Norm(1.0), Norm(), nn.LayerNorm(6, bias=False)
    x = torch.randn(2, 6)
    wanted = norm(x)
    taken.forward = types.MethodType(lambda self, x: x, taken)  # type: ignore[method-assign]
    whole: Any = norm.weight.data
    norm.weight.data, norm.weight.ds_shape = torch.empty(0), whole.shape  # type: ignore[attr-defined]
    for one in (norm, other, taken, layer_norm):
        bind_norm(one)
    norm.weight.data = whole
    assert torch.allclose(norm(x), wanted, atol=1e-6)
    assert "forward" in vars(norm)
    assert not any("forward" in vars(one) for one in (other, layer_norm))
    assert taken(x) is x


# --- under ZeRO-3 ----------------------------------------------------------------------------------------------------


def loss_of(model: CausalModel, micro: TokenBatch, count: Tensor) -> Loss:
    return Loss(-model.forward(micro.tokens, micro.targets)[0].sum() / count, {})


def one_step(world: World, folder: str, binds: bool) -> dict[str, Any]:
    """Gradients of a step whose parameters are all gathered for a moment alone."""
    from deepspeed.utils import safe_get_full_grad

    from gearshift.engine import zero

    if not binds:
        zero.bind_fused = lambda *given: None
    extra = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    training = Training(learning_rate=0.1, optimizer="sgd", gradient_checkpointing=True)
    model = CausalModel.load(
        folder, world, dtype=torch.float32, micro_batch_size=2, training=training, deepspeed_extra=extra
    )
    zero.bind_fused = bind_fused
    tokens = torch.randint(3, 131, (4, 10), generator=torch.Generator().manual_seed(0))
    model.accumulate(loss_of, TokenBatch(tokens, tokens.roll(-1, 1)).select(world.share(4)))
    return {
        "bound": bound(model.module),
        **{n: safe_get_full_grad(p).clone() for n, p in model.module.named_parameters()},
    }


def test_gradients_on_two_ranks(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    folder = str(save_tiny("qwen3", tmp_path / "model"))
    plain, fused = (two_ranks.run(one_step, folder, binds)[0] for binds in (False, True))
    assert (plain.pop("bound"), fused.pop("bound")) == ((0, 0, False), BOUND["qwen3"])
    same(fused, plain)
