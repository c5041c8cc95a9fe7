"""LoRA on two ranks: what trains, what rollouts get, and what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import CausalModel, HybridEngine, Sampling, Training, World
from gearshift.engine.adapters import is_adapter
from gearshift.engine.saving import gathered_parameters, save_adapters
from gearshift.engine.settings import LoraSettings
from gearshift.errors import UserError
from tests.engine.test_hybrid import nll, replica_is_gathered, some_prompts
from tests.models import save_tiny
from tests.worker_group import WorkerGroup

LORA = LoraSettings(rank=3, alpha=6.0)
SAMPLING = Sampling(12, eos_ids=(2,), seed=3)


def _policy(world: World, folder: str, tp_size: int, **more: Any) -> HybridEngine:
    training = Training(learning_rate=5e-2, max_grad_norm=0.0)
    more = {"lora": LORA, "dtype": torch.float32} | more
    return HybridEngine.load(folder, world, micro_batch_size=4, training=training, tp_size=tp_size, **more)


def roll_and_train(world: World, folder: str, tp_size: int, out: str, dtype: torch.dtype) -> dict[str, Any]:
    """Two steps, with a rollout before, between and after; then all that is to be held against each other."""
    # Kept whole by every rank, as DeepSpeed does with parameters this small, or cut: rollouts take two ways.
    kept = {"zero_optimization": {"stage3_param_persistence_threshold": 10**5 if tp_size == 1 else 0}}
    policy = _policy(world, folder, tp_size, dtype=dtype, deepspeed_extra=kept)
    mine = some_prompts(6).select(world.share(6))
    base = {n: p.ds_tensor.clone() for n, p in policy.module.named_parameters() if not is_adapter(n)}
    found: dict[str, Any] = {"gaps": [], "replica_same": []}
    for step in range(3):
        with policy.rollout() as generator:
            rollouts = generator.generate(mine, SAMPLING)
            found["replica_same"].append(replica_is_gathered(policy))
        gap = ((policy.logprobs(rollouts) - rollouts.logprobs) * rollouts.mask).abs()
        found["gaps"].append(float(gap.max() if dtype == torch.float32 else gap.mean()))
        if step < 2:
            policy.accumulate(nll, rollouts)
            policy.step()
    after = {n: p.ds_tensor for n, p in policy.module.named_parameters() if not is_adapter(n)}
    found["base_same"] = all(torch.equal(base[n], after[n]) for n in base)
    found["trained"] = sum(p.ds_numel for p in policy.module.parameters() if p.requires_grad)
    found["moved"] = float((policy.logprobs(rollouts) - policy.without_adapters().logprobs(rollouts)).abs().max())
    original = CausalModel.load(folder, world, dtype=dtype, micro_batch_size=4)
    found["reference_same"] = torch.equal(policy.without_adapters().logprobs(rollouts), original.logprobs(rollouts))
    exact = policy.against(policy.without_adapters(), rollouts)
    found["exact_same"] = all(torch.equal(a, b) for a, b in zip(exact, policy.against(original, rollouts), strict=True))
    policy.save_pretrained(f"{out}/merged")
    save_adapters(policy.module, Path(out) / "adapter", world, folder)
    found["weights"] = dict(gathered_parameters(policy.module))
    found["logprobs"], found["rollouts"] = policy.logprobs(rollouts), rollouts
    return found


@pytest.mark.parametrize(("tp_size", "dtype"), [(1, torch.float32), (2, torch.float32), (2, torch.bfloat16)])
def test_adapters_train_and_rollouts_get_the_merged_weights(
    two_ranks: WorkerGroup, tmp_path: Path, tp_size: int, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_tiny("llama", tmp_path / "llama")
    ranks = two_ranks.run(roll_and_train, str(folder), tp_size, str(tmp_path), dtype)
    for found in ranks:
        assert found["base_same"]
        assert found["replica_same"] == [True, True, True]
        assert max(found["gaps"]) <= (1e-5 if dtype == torch.float32 else 0.1)
        assert found["moved"] > 0.01, "the adapters must have learned something for this test to mean anything"
        assert found["reference_same"]
        assert found["exact_same"]
    whole = AutoModelForCausalLM.from_pretrained(folder)
    linears = [m for n, m in whole.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert ranks[0]["trained"] == sum(LORA.rank * (m.in_features + m.out_features) for m in linears)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in ranks[0]["weights"].items():
        assert torch.equal(merged[name], tensor), name


def test_what_is_saved_gives_the_same_log_probs(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    """The merged folder, and the base with the adapter folder over it, by the libraries that users have."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = save_tiny("llama", tmp_path / "llama")
    found = two_ranks.run(roll_and_train, str(folder), 2, str(tmp_path), torch.float32)[0]
    rollouts = found["rollouts"]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "adapter"))
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), adapted):
        for b in range(len(rollouts)):
            prompt, response = rollouts.tokens[b, : rollouts.lengths[b]], rollouts.responses[b][rollouts.mask[b]]
            with torch.no_grad():
                logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
            own = torch.log_softmax(logits, -1).gather(1, response[:, None])[:, 0]
            torch.testing.assert_close(found["logprobs"][b][rollouts.mask[b]], own, atol=2e-5, rtol=0)


def load_with(world: World, folder: str, targets: list[str]) -> str:
    try:
        CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=1, lora=LoraSettings(targets=targets))
    except UserError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize(
    ("targets", "words"), [(["no_such_layer"], "no_such_layer"), (["embed_tokens"], "adapters go beside Linear layers")]
)
def test_layers_that_cannot_have_an_adapter(
    two_ranks: WorkerGroup, tmp_path: Path, targets: list[str], words: str
) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    for message in two_ranks.run(load_with, str(folder), targets):
        assert message.startswith("policy.lora.targets:")
        assert words in message
