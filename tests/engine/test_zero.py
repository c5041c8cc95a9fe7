"""ZeRO-3 models: gradients that know neither ranks nor micro-batches, loading, saving, heads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import CausalModel, Episodes, RewardModel, TokenBatch, Training, World
from gearshift.engine.saving import gathered_parameters
from gearshift.errors import NotFinite, UserError
from gearshift.kernels import Loss, policy_loss, value_loss
from tests.models import FAMILIES, save_tiny, tiny_config
from tests.worker_group import WorkerGroup

ROWS, LENGTH = 16, 10


def token_batch(seed: int = 0) -> TokenBatch:
    """Rows of unequal numbers of targets, so that a mean of means would differ from the mean."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 131, (ROWS, LENGTH), generator=generator)
    targets = tokens.roll(-1, 1)
    lengths = torch.randint(1, LENGTH, (ROWS,), generator=generator)
    return TokenBatch(tokens, targets.masked_fill(torch.arange(LENGTH) >= lengths[:, None], -100))


def episodes(seed: int = 0) -> Episodes:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (ROWS,), generator=g)
    mask = torch.arange(7) < torch.randint(1, 8, (ROWS, 1), generator=g)
    row = torch.arange(ROWS)

    def noise() -> torch.Tensor:
        return torch.randn(ROWS, 7, generator=g) * mask

    tokens = torch.randint(3, 131, (ROWS, 5), generator=g)
    responses = torch.randint(3, 131, (ROWS, 7), generator=g)
    return Episodes(
        tokens, lengths, row, row, row * 0, responses, -4 - noise().abs(), mask, row > 0,
        noise(), noise(), noise()[:, 0], noise(), noise(), noise(), noise(), mask.float(),
    )  # fmt: skip


def language_loss(model: CausalModel, micro: TokenBatch, count: torch.Tensor) -> Loss:
    return Loss(-model.forward(micro.tokens, micro.targets)[0].sum() / count, {})


def ppo_policy_loss(model: CausalModel, micro: Episodes, count: torch.Tensor) -> Loss:
    logprobs, _ = model.response_logprobs(micro)
    return policy_loss(logprobs, micro.logprobs, micro.advantages, micro.mask, tokens=count)


def ppo_value_loss(model: RewardModel, micro: Episodes, count: torch.Tensor) -> Loss:
    values = model.response_values(micro)
    return value_loss(values, micro.values, micro.returns, micro.mask, tokens=count)


LOSSES: dict[str, Any] = {"language": language_loss, "policy": ppo_policy_loss, "value": ppo_value_loss}


def one_sgd_step(world: World, folder: str, name: str, micro: int, dtype: torch.dtype, rows: int) -> dict[str, Any]:
    training = Training(learning_rate=0.1, optimizer="sgd", max_grad_norm=0.0)
    kind = RewardModel if name == "value" else CausalModel
    more = {"new_head": True} if name == "value" else {}
    model = kind.load(folder, world, dtype=dtype, micro_batch_size=micro, training=training, **more)
    batch = (token_batch() if name == "language" else episodes()).select(slice(0, rows))
    metrics = model.accumulate(LOSSES[name], batch.select(world.share(rows)))
    gradients = {n: _gradient(p) for n, p in model.module.named_parameters()}
    model.step()
    weights = dict(gathered_parameters(model.module))
    return {"loss": metrics["loss"].item(), "gradients": gradients, "weights": weights}


def _gradient(parameter: Any) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_grad

    gradient: torch.Tensor = safe_get_full_grad(parameter)
    return gradient.clone()


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    difference = sum(float(((a[n].double() - b[n].double()) ** 2).sum()) for n in a)
    return float((difference / sum(float((b[n].double() ** 2).sum()) for n in b)) ** 0.5)


@pytest.mark.parametrize("name", list(LOSSES))
def test_gradients_know_neither_ranks_nor_micro_batches(
    one_rank: WorkerGroup, two_ranks: WorkerGroup, tmp_path: Path, name: str
) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama"))
    reference = one_rank.run(one_sgd_step, folder, name, ROWS, torch.float32, ROWS)[0]
    assert sum(float(g.abs().sum()) for g in reference["gradients"].values()) > 0
    for group in (one_rank, two_ranks):
        for micro in (1, 2, 8):
            found = group.run(one_sgd_step, folder, name, micro, torch.float32, ROWS)[0]
            assert abs(found["loss"] - reference["loss"]) <= 1e-6 * max(1.0, abs(reference["loss"]))
            assert distance(found["gradients"], reference["gradients"]) <= 1e-5
            assert distance(found["weights"], reference["weights"]) <= 1e-5


def test_ranks_with_unequal_rows(one_rank: WorkerGroup, two_ranks: WorkerGroup, tmp_path: Path) -> None:
    """13 rows in micro-batches of 2: one rank has four of them, the other three and a repeat that adds nothing."""
    folder = str(save_tiny("llama", tmp_path / "llama"))
    reference = one_rank.run(one_sgd_step, folder, "language", 13, torch.float32, 13)[0]
    found = two_ranks.run(one_sgd_step, folder, "language", 2, torch.float32, 13)[0]
    assert abs(found["loss"] - reference["loss"]) <= 1e-6 * max(1.0, abs(reference["loss"]))
    assert distance(found["gradients"], reference["gradients"]) <= 1e-5


def passes_of(world: World, folder: str, tokens: int | None) -> tuple[list[int], list[int]]:
    """Rows of each forward that a backward follows, and of each one alone; 8 rows of this rank."""
    training = Training(learning_rate=0.1)
    model = CausalModel.load(
        folder, world, dtype=torch.float32, micro_batch_size=2, micro_batch_tokens=tokens, training=training
    )
    batch, trained, alone = token_batch().select(world.share(ROWS)), list[int](), list[int]()

    def loss(model: CausalModel, micro: TokenBatch, count: torch.Tensor) -> Loss:
        trained.append(len(micro))
        return language_loss(model, micro, count)

    def seen(micro: TokenBatch) -> torch.Tensor:
        alone.append(len(micro))
        return model.forward(micro.tokens, micro.targets)[0]

    model.accumulate(loss, batch)
    model.map(seen, batch)
    return trained, alone


@pytest.mark.parametrize("tokens", [None, 2 * LENGTH])
def test_a_forward_alone_takes_two_micro_batches(two_ranks: WorkerGroup, tmp_path: Path, tokens: int | None) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama"))
    for trained, alone in two_ranks.run(passes_of, folder, tokens):
        assert sum(trained) == sum(alone) == 8
        assert len(alone) < len(trained)
        if tokens is None:
            assert (len(alone), len(trained)) == (2, 4)


def repeated(batch: Any, times: int) -> Any:
    return type(batch)(**{n: torch.cat([t] * times) for n, t in vars(batch).items()})


def in_bf16(world: World, folder: str, name: str, micro: int, accumulate_in: str | None) -> dict[str, Any]:
    """128 rows, 64 a rank; with `accumulate_in` bf16 as DeepSpeed would do it by itself."""
    import gearshift.engine.zero as zero

    own = zero.zero3_config

    def mutated(*args: Any) -> dict[str, Any]:
        config = own(*args)
        return config if accumulate_in is None else {
            **{key: value for key, value in config.items() if key != "communication_data_type"},
            "data_types": {"grad_accum_dtype": accumulate_in},
        }  # fmt: skip

    zero.zero3_config = mutated
    try:
        training = Training(learning_rate=0.1, optimizer="sgd", max_grad_norm=0.0)
        kind, more = (RewardModel, {"new_head": True}) if name == "value" else (CausalModel, {})
        model = kind.load(folder, world, dtype=torch.bfloat16, micro_batch_size=micro, training=training, **more)
        batch = repeated(token_batch() if name == "language" else episodes(), 8)
        metrics = model.accumulate(LOSSES[name], batch.select(world.share(len(batch))))
        gradients = {n: _gradient(p) for n, p in model.module.named_parameters()}
        model.step()
    finally:
        zero.zero3_config = own
    weights = {n: t.float() for n, t in gathered_parameters(model.module)}
    return {"loss": metrics["loss"].item(), "gradients": gradients, "weights": weights}


# Each micro-batch's own gradient is rounded to bf16 (2^-9 relative), and their fp32 sum keeps that size.
BF16_BOUND = 4e-3


@pytest.mark.parametrize("name", list(LOSSES))
def test_bf16_gradients_do_not_drown_in_micro_batches(two_ranks: WorkerGroup, tmp_path: Path, name: str) -> None:
    """64 micro-batches against 1."""
    folder = str(save_tiny("llama", tmp_path / "llama"))
    one, many = (two_ranks.run(in_bf16, folder, name, micro, None)[0] for micro in (64, 1))
    assert abs(many["loss"] - one["loss"]) <= BF16_BOUND * max(1.0, abs(one["loss"]))
    assert distance(many["gradients"], one["gradients"]) <= BF16_BOUND
    assert distance(many["weights"], one["weights"]) <= BF16_BOUND


def test_adding_64_bf16_gradients_in_bf16_would_be_seen(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama"))
    one, many = (two_ranks.run(in_bf16, folder, "language", micro, "bf16")[0] for micro in (64, 1))
    assert distance(many["gradients"], one["gradients"]) > BF16_BOUND


def loaded_weights(world: World, folder: str) -> dict[str, torch.Tensor]:
    model = CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=2)
    return dict(gathered_parameters(model.module))


def load_and_save(world: World, folder: str, out: str) -> None:
    from gearshift.engine.saving import save_pretrained

    model = CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=2)
    # Files of 10 kB: the index and the order of files are used.
    save_pretrained(model.module, Path(out), world, max_file_bytes=10_000)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_load_and_save_are_from_pretrained(two_ranks: WorkerGroup, tmp_path: Path, family: str) -> None:
    """Loaded shards are the folder's weights (and the fused head passed its check), and a saved folder loads."""
    from transformers import AutoModelForCausalLM

    folder = save_tiny(family, tmp_path / family)
    two_ranks.run(load_and_save, str(folder), str(tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    original = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    saved, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, original[name]), name
    again = two_ranks.run(loaded_weights, str(tmp_path / "out"))[0]
    assert all(torch.equal(tensor, original[name]) for name, tensor in again.items())


def from_nothing(world: World, seed: int) -> dict[str, torch.Tensor]:
    config = tiny_config("llama", pad_token_id=0)
    model = CausalModel.load("config", world, dtype=torch.float32, micro_batch_size=2, config=config, seed=seed)
    return dict(gathered_parameters(model.module))


def test_from_nothing_depends_on_the_seed_alone(one_rank: WorkerGroup, two_ranks: WorkerGroup) -> None:
    """A pad token in the config is no trouble, and one rank draws what two do."""
    a, b = one_rank.run(from_nothing, 5)[0], two_ranks.run(from_nothing, 5)[0]
    assert all(torch.equal(a[n], b[n]) for n in a)
    other = one_rank.run(from_nothing, 6)[0]
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(a[name], other[name])
    assert abs(a[name].std().item() - 0.02) < 0.005
    assert torch.equal(a["model.norm.weight"], torch.ones(32))


def refused(world: World, folder: str) -> str:
    try:
        CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=2)
    except UserError as error:
        return str(error)
    return "loaded"


def test_misshapen_and_missing_weights_stop_every_rank(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny("llama", tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    lacking = {n: t for n, t in weights.items() if n != "model.norm.weight"}
    save_file(lacking, folder / "model.safetensors", metadata={"format": "pt"})
    assert all("lack model.norm.weight" in m for m in two_ranks.run(refused, str(folder)))
    weights["model.norm.weight"] = torch.ones(31)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert all("model.norm.weight has shape [31]" in m for m in two_ranks.run(refused, str(folder)))
    assert all("neither a folder nor a model" in m for m in two_ranks.run(refused, "/nowhere/at/all"))


def unknown_head(world: World, folder: str) -> str:
    from transformers import LlamaForCausalLM

    own = LlamaForCausalLM.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = own(self, *args, **kwargs)
        result.logits = result.logits * 2
        return result

    LlamaForCausalLM.forward = doubled
    try:
        return refused(world, folder)
    finally:
        LlamaForCausalLM.forward = own


def test_a_head_that_does_more_is_refused(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama"))
    assert all("differ from the model's own logits" in m for m in two_ranks.run(unknown_head, folder))


def one_rank_without_targets(world: World, folder: str) -> dict[str, torch.Tensor]:
    training = Training(learning_rate=0.1, optimizer="sgd", max_grad_norm=0.0)
    model = CausalModel.load(folder, world, dtype=torch.float32, micro_batch_size=4, training=training)
    batch = token_batch().select(slice(0, 8))
    if world.rank == 1:
        batch = TokenBatch(batch.tokens, torch.full_like(batch.targets, -100))
    model.accumulate(language_loss, batch)
    return {n: _gradient(p) for n, p in model.module.named_parameters()}


def test_a_rank_without_targets_takes_part(one_rank: WorkerGroup, two_ranks: WorkerGroup, tmp_path: Path) -> None:
    """Its gradient is zero, not missing: ZeRO-3's collectives would wait for it for ever."""
    folder = str(save_tiny("llama", tmp_path / "llama"))
    alone = one_rank.run(one_rank_without_targets, folder)[0]
    found = two_ranks.run(one_rank_without_targets, folder)[0]
    assert distance(found, alone) <= 1e-5


def spoilt_loss(value: float) -> Callable[..., Loss]:
    """The loss, times `value` on rank 1."""

    def loss(model: CausalModel, micro: TokenBatch, count: torch.Tensor) -> Loss:
        loss = language_loss(model, micro, count).loss
        return Loss(loss * value if model.world.rank == 1 else loss, {})

    return loss


def stopped_before_damage(
    world: World, folder: str, what: str, value: float, dtype: torch.dtype
) -> tuple[str, bool, int]:
    """What is told of a loss or a gradient with `value` in it on rank 1; whether weights and moments are untouched."""
    training = Training(learning_rate=0.1)
    model = CausalModel.load(folder, world, dtype=dtype, micro_batch_size=8, training=training)
    batch = token_batch().select(world.share(ROWS))
    model.accumulate(language_loss, batch)
    model.step()
    before = masters(model)
    try:
        model.accumulate(spoilt_loss(value) if what == "loss" else language_loss, batch)
        if what == "gradient" and world.rank == 1:
            model.engine.optimizer.averaged_gradients[0][0].view(-1)[0] = value
        model.step()
        told = "went on"
    except NotFinite as error:
        told = str(error)
    after = masters(model)
    return told, all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), len(before)


def masters(model: CausalModel) -> list[torch.Tensor]:
    """Weights, fp32 masters and moments of this rank."""
    optimizer = model.engine.optimizer
    tensors = [*(p.ds_tensor for p in model.module.parameters()), *optimizer.fp32_partitioned_groups_flat]
    tensors += [t for state in optimizer.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return [tensor.detach().clone() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_on_one_rank_stops_all(
    two_ranks: WorkerGroup, tmp_path: Path, what: str, value: float, dtype: torch.dtype
) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama"))
    name = "loss" if what == "loss" else "gradient norm"
    where = " on rank 1" if what == "loss" else ""
    for told, unchanged, tensors in two_ranks.run(stopped_before_damage, folder, what, value, dtype):
        shown = value if what == "loss" else torch.inf  # DeepSpeed's sign for a norm that is none
        assert told == f"the {name} of step 2 is {shown}{where}; no weight was changed"
        assert unchanged
        assert tensors > 20


def offloaded_step(world: World, folder: str) -> dict[str, torch.Tensor]:
    extra = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}
    training = Training(learning_rate=0.1, optimizer="sgd", max_grad_norm=0.0)
    model = CausalModel.load(
        folder, world, dtype=torch.float32, micro_batch_size=8, training=training, deepspeed_extra=extra
    )
    model.accumulate(language_loss, token_batch().select(world.share(ROWS)))
    model.step()
    return dict(gathered_parameters(model.module))


def test_offloading_changes_no_weight(one_rank: WorkerGroup, two_ranks: WorkerGroup, tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama"))
    reference = one_rank.run(one_sgd_step, folder, "language", ROWS, torch.float32, ROWS)[0]
    assert distance(two_ranks.run(offloaded_step, folder)[0], reference["weights"]) <= 1e-5


def eos_row_gradient(world: World, folder: str) -> float:
    model = CausalModel.load(
        folder, world, dtype=torch.float32, micro_batch_size=16, training=Training(learning_rate=0.1)
    )
    batch = token_batch()
    batch.tokens[:, 0] = 2
    model.accumulate(language_loss, batch.select(world.share(ROWS)))
    gradient = {n: _gradient(p) for n, p in model.module.named_parameters()}["model.embed_tokens.weight"]
    return float(gradient[2].abs().sum())


def test_a_pad_token_equal_to_eos_still_learns(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "llama", pad_token_id=2))
    assert min(two_ranks.run(eos_row_gradient, folder)) > 0


def test_what_the_folder_says_beside_its_weights_is_kept(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    """Dropout rates (off while Gearshift trains) and the tokens that end a response."""
    import json

    folder = save_tiny("llama", tmp_path / "llama", attention_dropout=0.25)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    two_ranks.run(load_and_save, str(folder), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out/config.json").read_text())["attention_dropout"] == 0.25
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [2, 7]


def test_weights_without_a_place_are_refused(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny("llama", tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.lora_A.weight"] = torch.ones(2, 2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert all("lora_A.weight has no place" in m for m in two_ranks.run(refused, str(folder)))
