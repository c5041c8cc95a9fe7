"""PPO and PPO-ptx end to end on tiny models: metrics, one step for both gradients, one rank against two."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.engine import CausalModel, Training, World
from gearshift.engine.saving import gathered_parameters
from gearshift.errors import UserError
from gearshift.kernels import Loss
from gearshift.launch.config import validate
from gearshift.rlhf.data.sampling import Sampler
from gearshift.rlhf.language import language_loss
from gearshift.rlhf.ppo import Ppo, ppo
from gearshift.rlhf.ppo_data import PpoData
from gearshift.rlhf.ppo_models import load_models
from tests.rlhf.tiny import Recorder, changed, ppo_values, prompt_rows
from tests.worker_group import WorkerGroup

# ANCHORS, point 13, and what the run folder adds to it.
METRICS = {
    "objective/kl",
    "objective/rlhf_reward",
    "objective/scores",
    "objective/entropy",
    "objective/episodes",
    "objective/kl_coef",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "policy/grad_norm",
    "loss/policy_avg",
    "loss/value_avg",
    "val/ratio",
    "critic/explained_variance",
    "critic/grad_norm",
    "memory/peak_gib",
    "policy/entropy_avg",
    "policy/updates",
    "timing/generation",
    "timing/shift",
    "timing/allocation",
    "timing/capture",
    "timing/offload",
    "shift/bytes_inside_host",
    "shift/bytes_between_hosts",
    "timing/score",
    "timing/train",
    "timing/step",
    "throughput/tokens_per_second",
    "throughput/tokens_per_second_per_rank",
    "rollout/logprob_gap",
    "rollout/length",
    "rollout/finished",
    "optimizer/learning_rate",
}
BATCH, MINIBATCHES, COEF = 8, 2, 3.5


def two_iterations_values(folder: Path) -> dict[str, Any]:
    """A config of two iterations of PPO; the tests change it with `changed`."""
    ppo = {
        "episodes": 2 * BATCH,
        "batch_size": BATCH,
        "minibatches": MINIBATCHES,
        "warmup_iterations": 2,
        "validate_every": 1,
        "kl": {"coef": 0.1},
    }
    return ppo_values(folder, ppo=ppo)


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return two_iterations_values(tmp_path_factory.mktemp("ppo"))


def run_ppo(world: World, values: dict[str, Any]) -> Recorder:
    config: Any = validate("ppo", values)
    report = Recorder()
    ppo(config, report)
    return report


@pytest.mark.parametrize("coef", [0.0, COEF])
def test_two_iterations_end_to_end(two_ranks: WorkerGroup, values: dict[str, Any], tmp_path: Path, coef: float) -> None:
    """Five validation prompts over two ranks in micro-batches of 3 and 2; Adam, TP 2."""
    values = changed(values, run={"folder": str(tmp_path / "run")}, ptx={"coef": coef})
    first, second = two_ranks.run(run_ppo, values, timeout=90)
    found = first.metrics
    assert len(found) == 2
    for number, metrics in enumerate(found, 1):
        expected = METRICS | {"loss/pretraining_heldout", "validation/scores"} | ({"loss/ptx_avg"} if coef else set())
        assert set(metrics) >= expected
        assert ("loss/ptx_avg" in metrics) == (coef > 0)
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["rollout/logprob_gap"] <= 1e-5
        assert metrics["objective/episodes"] == number * BATCH
        assert metrics["objective/kl_coef"] == 0.1
        assert 1 <= metrics["rollout/length"] <= 6
        assert metrics["timing/step"] >= sum(metrics[f"timing/{p}"] for p in ("generation", "shift", "score", "train"))
    assert max(metrics["rollout/logprob_gap"] for metrics in found) > 0, "two ways of computing round alike everywhere"
    check_start_and_rates(found)
    check_samples(first.rows)
    # Both ranks tell the same, but for what they measure with their own clocks.
    timed = ("timing/", "throughput/", "shift/bytes_", "memory/")
    for one, other in zip(found, second.metrics, strict=True):
        names = [name for name in one if not name.startswith(timed)]
        assert {n: one[n] for n in names} == pytest.approx({n: other[n] for n in names}, rel=1e-6, abs=1e-9)
    check_folder(values["policy"]["init"], tmp_path / "run/model")


def test_adapters(two_ranks: WorkerGroup, values: dict[str, Any], tmp_path: Path) -> None:
    """LoRA: the KL starts at 0 against the policy with its adapters off; model/ is merged, adapter/ beside it."""
    values = changed(
        values,
        run={"folder": str(tmp_path / "run")},
        policy={"lora": {"rank": 2}},
        ppo={"kl": {"coef": 0.1, "estimator": "exact"}},
    )
    first, second = two_ranks.run(run_ppo, values, timeout=90)[0].metrics
    assert abs(first["objective/kl"]) <= 1e-5
    assert abs(second["objective/kl"]) > 1e-4
    assert max(metrics["rollout/logprob_gap"] for metrics in (first, second)) <= 1e-5
    check_folder(values["policy"]["init"], tmp_path / "run/model", frozen=("embed_tokens", "norm", "lm_head"))
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["r"] == 2


def answer_twice(world: World, values: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    run, seen = build(world, values), []
    score = run.reward_model.score
    run.reward_model.score = lambda rollouts: (seen.append(rollouts), score(rollouts))[1]  # type: ignore
    return seen, run.iteration(1)


def test_two_answers_to_a_prompt_from_a_part_of_the_distribution(
    two_ranks: WorkerGroup, values: dict[str, Any]
) -> None:
    """`ppo.answers`, top-k, top-p and a stop text: the ratio of PPO still starts at 1."""
    rollout = {"max_new_tokens": 12, "top_k": 30, "top_p": 0.9, "stop": ["e", "th"]}
    values = changed(values, rollout=rollout, ppo={"answers": 2}, ptx={"coef": 0.0, "data": []})
    rows = []
    for (rollouts,), metrics in two_ranks.run(answer_twice, values):
        assert metrics["val/ratio"] == pytest.approx(1.0, abs=0.05)
        assert metrics["rollout/logprob_gap"] <= 1e-5
        for b in range(len(rollouts)):
            answer = tuple(rollouts.responses[b][rollouts.mask[b]].tolist())
            rows.append((int(rollouts.ids[b]), int(rollouts.draws[b]), int(rollouts.samples[b]), answer))
    drawn = next(Sampler(20, BATCH // 2, 3))
    numbers = list(zip(drawn.rows, drawn.draws, strict=True))
    assert [row[:3] for row in rows] == [(*number, sample) for number in numbers for sample in (0, 1)]
    assert len({row[3] for row in rows}) > BATCH // 2


def test_the_exact_estimator(two_ranks: WorkerGroup, values: dict[str, Any], tmp_path: Path) -> None:
    """The KL to the reference is 0 before the first update, and never negative: it is no estimate."""
    values = changed(values, run={"folder": str(tmp_path / "run")}, ptx={"coef": 0.0, "data": []})
    values["ppo"] = values["ppo"] | {"kl": {"coef": 0.1, "estimator": "exact"}}
    first, second = two_ranks.run(run_ppo, values, timeout=90)[0].metrics
    scores, reward = (metrics["objective/scores"] for metrics in (first, second)), "objective/rlhf_reward"
    penalties = [score - metrics[reward] for score, metrics in zip(scores, (first, second), strict=True)]
    assert abs(penalties[0]) <= 1e-5
    assert penalties[1] > 1e-5


def check_start_and_rates(found: list[dict[str, float]]) -> None:
    """Before the first update the policy is the reference; rates rise from one tenth over two iterations."""
    assert abs(found[0]["objective/kl"]) < 1e-4
    assert found[0]["objective/rlhf_reward"] == pytest.approx(found[0]["objective/scores"], abs=1e-4)
    assert abs(found[1]["objective/kl"]) > 1e-4
    assert found[0]["val/ratio"] == pytest.approx(1.0, abs=0.05)
    assert [m["optimizer/learning_rate"] for m in found] == pytest.approx([1e-4, 5.5e-4])
    assert [m["optimizer/critic_learning_rate"] for m in found] == pytest.approx([2e-4, 1.1e-3])


def check_samples(rows: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert set(rows[0]) == {"step", "prompt", "response", "score", "kl", "finished"}
    known = {row["prompt"] for row in prompt_rows(20)}
    assert {row["prompt"] for row in rows} <= known
    assert all(isinstance(row["finished"], bool) for row in rows)
    json.dumps(rows)


def check_folder(before: str, after: Path, frozen: tuple[str, ...] = ()) -> None:
    """The run's model loads as it is, with its tokenizer, and only what has a part of `frozen` in its name is as it
    was."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(after, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    old = AutoModelForCausalLM.from_pretrained(before).state_dict()
    same = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, old[name])]
    assert same == [name for name in old if any(part in name for part in frozen)]
    assert AutoTokenizer.from_pretrained(after).get_vocab() == AutoTokenizer.from_pretrained(before).get_vocab()
    AutoModelForSequenceClassification.from_pretrained(after.with_name("critic"))


def build(world: World, values: dict[str, Any]) -> Ppo:
    config: Any = validate("ppo", values)
    report = Recorder()
    data = PpoData.load(config, world, report)
    return Ppo(config, world, load_models(config, world, data), data, report)


def gradients_of(model: CausalModel) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_grad

    return {name: safe_get_full_grad(p).clone() for name, p in model.module.named_parameters()}


def gradients_of_one_iteration(world: World, values: dict[str, Any]) -> tuple[list[dict[str, Tensor]], int, int]:
    """What each policy step of the first iteration applies; steps of policy and critic."""
    run, seen = build(world, values), []
    own_step = run.policy.step

    def step() -> float:
        seen.append(gradients_of(run.policy))
        return own_step()

    run.policy.step = step  # type: ignore[method-assign]
    run.iteration(1)
    return seen, run.policy.steps, run.critic.steps


def gradient_of_text(world: World, values: dict[str, Any]) -> dict[str, Tensor]:
    """The language-model gradient, alone, of the text that the first policy step reads."""
    config: Any = validate("ppo", values)
    data = PpoData.load(config, world, Recorder())
    training = Training(learning_rate=1.0, max_grad_norm=0.0)
    policy = CausalModel.load(config.policy.init, world, dtype=torch.float32, micro_batch_size=3, training=training)
    policy.accumulate(language_loss, next(data.pretraining))
    return gradients_of(policy)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    difference = sum(float((a[n].double() - b[n].double()).square().sum()) for n in a)
    return float((difference / sum(float(b[n].double().square().sum()) for n in b)) ** 0.5)


def test_ptx_adds_its_gradient_to_the_same_step(two_ranks: WorkerGroup, values: dict[str, Any]) -> None:
    """PPO-ptx's gradient is PPO's + coef · the text's, in one optimizer step for each minibatch, at any micro-batch."""
    with_text = changed(values, ptx={"coef": COEF}, optimizer={"max_grad_norm": 0.0})
    without = changed(values, ptx={"coef": 0.0}, optimizer={"max_grad_norm": 0.0})
    (ptx, policy_steps, critic_steps), _ = two_ranks.run(gradients_of_one_iteration, with_text)
    assert (len(ptx), policy_steps, critic_steps) == (MINIBATCHES, MINIBATCHES, MINIBATCHES)
    plain = two_ranks.run(gradients_of_one_iteration, without)[0][0]
    text = two_ranks.run(gradient_of_text, with_text)[0]
    both = {name: plain[0][name] + COEF * text[name] for name in text}
    assert distance(ptx[0], both) < 1e-6
    finer = two_ranks.run(gradients_of_one_iteration, changed(with_text, ppo={"micro_batch_size": 1}))[0][0]
    assert distance(finer[0], both) < 1e-6
    assert distance(ptx[0], plain[0]) > 0.05
    assert distance(ptx[0], {name: COEF * t for name, t in text.items()}) > 0.05


def two_iterations(world: World, values: dict[str, Any]) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    run = build(world, values)
    found = [run.iteration(1), run.iteration(2)]
    return found, dict(gathered_parameters(run.policy.module))


def test_one_rank_is_two_ranks(one_rank: WorkerGroup, two_ranks: WorkerGroup, values: dict[str, Any]) -> None:
    """The same prompts, answers, losses and norms, whatever the ranks, TP degree and micro-batches; SGD."""
    sgd = {"name": "sgd", "learning_rate": 0.02}
    plain = changed(values, ptx={"coef": COEF}, optimizer=sgd, critic={"learning_rate": 0.02})
    alone = changed(plain, rollout={"tp_size": 1}, ppo={"micro_batch_size": 8})
    (one, weights) = one_rank.run(two_iterations, alone)[0]
    (two, weights_2) = two_ranks.run(two_iterations, plain)[0]
    other = ("timing/", "throughput/", "memory/", "rollout/logprob_gap", "shift/bytes_")
    for a, b in zip(one, two, strict=True):
        names = [name for name in a if not name.startswith(other)]
        assert {n: b[n] for n in names} == pytest.approx({n: a[n] for n in names}, rel=1e-4, abs=2e-5)
    assert distance(weights_2, weights) < 1e-5


def broken(world: World, values: dict[str, Any]) -> tuple[list[str], int, int, int]:
    """Errors of three iterations in which something is wrong on rank 1 alone, the prompt whose score it was in what
    was written out, and the steps taken: none.
    """
    run = build(world, values)
    own_score, own_logprobs = run.reward_model.score, run.policy.response_logprobs

    def score(rollouts: Any) -> Tensor:
        scores = own_score(rollouts)
        if world.rank == 1:
            scores[2] = torch.nan
        return scores

    run.reward_model.score = score  # type: ignore[method-assign]
    errors = [error_of(run)]
    written = Path(values["run"]["folder"]) / f"stopped/iteration-1-rank-{world.rank}.pt"
    kept = int(torch.load(written)["ids"][6])
    run.reward_model.score = own_score  # type: ignore[method-assign]

    def logprobs(*args: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        found, entropy = own_logprobs(*args, **named)
        return found + 0.01 * world.rank, entropy

    run.policy.response_logprobs = logprobs  # type: ignore[method-assign]
    errors.append(error_of(run))
    run.policy.response_logprobs = own_logprobs  # type: ignore[method-assign]
    own_loss = run.policy_loss
    run.policy_loss = lambda *args, **named: spoilt(own_loss(*args, **named), world)  # type: ignore[method-assign]
    errors.append(error_of(run))
    return errors, kept, run.policy.steps, run.critic.steps


def spoilt(loss: Loss, world: World) -> Loss:
    return Loss(loss.loss * (torch.inf if world.rank == 1 else 1.0), loss.metrics)


def error_of(run: Ppo) -> str:
    try:
        run.iteration(1)
    except UserError as error:
        return str(error)
    return "went on"


def test_what_is_wrong_on_one_rank_stops_every_rank(two_ranks: WorkerGroup, values: dict[str, Any]) -> None:
    """Before any weight moves, naming iteration and prompt: the third of rank 1, which is the batch's seventh."""
    prompt = next(Sampler(20, BATCH, 3)).rows[6]
    for (score, gap, loss), kept, policy_steps, critic_steps in two_ranks.run(broken, values):
        stopped = Path(values["run"]["folder"]) / "stopped"
        assert score == (
            f"iteration 1: scores is not finite for prompt {prompt} (rank 1); no weight was changed; "
            f"the batch is in {stopped}/"
        )
        assert kept == prompt
        assert gap.startswith("rollout.logprob_gap_limit: ")
        assert "differ by 0.01 nats, limit 0.001" in gap
        match = re.fullmatch(
            r"iteration 1: the loss of step 1 is -?(?:inf|nan) on rank 1 \(prompts (\d+), (\d+)\); "
            rf"no weight was changed; the batch is in {stopped}/",
            loss,
        )
        assert match
        ids = torch.load(stopped / "iteration-1-rank-1.pt")["ids"]
        assert sorted(map(int, match.groups())) == sorted(ids.tolist())
        assert policy_steps == critic_steps == 0


def validated(world: World, values: dict[str, Any]) -> list[dict[str, float]]:
    """With all five held-out prompts, again, and with the first of them alone."""
    run = build(world, values)
    found = [run.validate(), run.validate()]
    run.data.held_out_prompts = run.data.held_out_prompts[:1]
    return [*found, run.validate()]


def test_validation_counts_every_prompt_once(
    one_rank: WorkerGroup, two_ranks: WorkerGroup, values: dict[str, Any]
) -> None:
    """Five prompts over two ranks, and one over two, are what they are over one; the same answers each time."""
    alone = one_rank.run(validated, changed(values, rollout={"tp_size": 1}))[0]
    assert alone[0] == alone[1]
    assert set(alone[0]) == {"validation/scores", "validation/kl", "loss/pretraining_heldout"}
    assert alone[2]["validation/scores"] != pytest.approx(alone[0]["validation/scores"], rel=1e-2)
    for found in two_ranks.run(validated, values, timeout=60):
        for one, two in zip(alone, found, strict=True):
            assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
