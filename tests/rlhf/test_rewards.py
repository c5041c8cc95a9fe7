"""What may score responses: classifiers with their own tokenizers, held against `transformers`; Python functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import Rollouts, World
from gearshift.errors import SettingError, UserError
from gearshift.launch.config import validate
from gearshift.rlhf.data.encoding import Encoder, PromptRow
from gearshift.rlhf.data.formats import Keys
from gearshift.rlhf.data.sources import Record
from gearshift.rlhf.ppo import ppo
from gearshift.rlhf.rewards import Asked, load_function, load_reward
from gearshift.rlhf.settings import RewardSettings, names_function
from tests.models import SIZES
from tests.rlhf.tiny import SENTENCES, Recorder, changed, ppo_values, tiny_tokenizer
from tests.worker_group import WorkerGroup

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}!"
RESPONSES = ["the mat", "a dog", "far away and away", "", "ten"]


def foreign_tokenizer(kind: str) -> Any:
    """Byte-level, its ids not the policy's; a decoder's puts BOS first, an encoder's [CLS] a [SEP] b [SEP]."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    from gearshift.rlhf.data.tokenizers import EOS, PAD, train_tokenizer

    base = train_tokenizer(SENTENCES[:2], 280)
    special = {"bos_token": "<s>", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = ["input_ids", *(["token_type_ids"] if kind == "encoder" else []), "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base._tokenizer, eos_token=EOS, pad_token=PAD, model_input_names=names, **special
    )
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in special.values()}
    form = {"single": "<s> $A"}
    if kind == "encoder":
        form = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1"}
    tokenizer._tokenizer.post_processor = TemplateProcessing(**form, special_tokens=list(ids.items()))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_foreign(folder: Path, family: str, **more: Any) -> str:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(5)
    config = AutoConfig.for_model(family, **{**SIZES, "vocab_size": 300, "num_labels": 1, "pad_token_id": 1, **more})
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12.0 if family == "bert" else 4.0)
    model.save_pretrained(folder)
    foreign_tokenizer("encoder" if family == "bert" else "decoder").save_pretrained(folder)
    return str(folder)


def asked_rows() -> tuple[Any, list[PromptRow]]:
    tokenizer = tiny_tokenizer()
    records = [Record({"prompt": text, "number": n}, f"rows.jsonl:{n + 1}") for n, text in enumerate(SENTENCES[:5])]
    return tokenizer, Encoder(tokenizer, prompt_template="Q: {prompt} A:").prompts(records).rows


def made_rollouts(tokenizer: Any, rows: list[PromptRow]) -> Rollouts:
    """Answers of known words; all but the last one end with EOS."""
    from gearshift.rlhf.data.batches import collate_prompts

    eos = tokenizer.eos_token_id
    texts = [tokenizer(text)["input_ids"] for text in RESPONSES]
    tokens = [[*text, eos] if n < 4 else text for n, text in enumerate(texts)]
    width = max(map(len, tokens))
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in tokens])
    responses = torch.tensor([row + [7] * (width - len(row)) for row in tokens])
    prompts = collate_prompts(rows)
    fields = {name: getattr(prompts, name) for name in ("tokens", "lengths", "ids", "draws", "samples")}
    return Rollouts(**fields, responses=responses, logprobs=mask.float(), mask=mask, finished=mask.any(1))


def scores(world: World, settings: dict[str, Any]) -> list[float]:
    """Of this rank's share of the five answers: three on one rank, two on the other."""
    tokenizer, rows = asked_rows()
    rollouts = made_rollouts(tokenizer, rows).select(world.share(5))
    asked = Asked(tokenizer, Keys(), [], rows)
    reward = load_reward(RewardSettings(**settings), asked, world, dtype=torch.float32, micro_batch_size=2)
    return [float(score) for score in reward.score(rollouts)]


def expected_scores(folder: str, chat: bool) -> list[float]:
    """Each answer alone, without padding, by the model and tokenizer that `transformers` loads."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for number, (question, answer) in enumerate(zip(SENTENCES, RESPONSES, strict=False)):
        prompt = f"Q: {question} A:"
        if chat:
            text = f"<user>{question}<assistant>{answer}!"
            inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        elif model.config.model_type == "bert":
            inputs = tokenizer([prompt], [answer], return_tensors="pt")
            assert inputs["token_type_ids"].any()
        else:
            own = tokenizer(prompt)["input_ids"] + tokenizer(answer, add_special_tokens=False)["input_ids"]
            own += [tokenizer.eos_token_id] if number < 4 else []
            assert own[0] == tokenizer.bos_token_id
            inputs = {"input_ids": torch.tensor([own])}
        with torch.no_grad():
            found.append(float(model(**inputs).logits[0, 0]) - getattr(model.config, "reward_bias", 0.0))
    return found


@pytest.mark.parametrize(("family", "chat"), [("llama", False), ("llama", True), ("gpt2", False), ("bert", False)])
def test_text_in_the_reward_model_s_own_tokens(two_ranks: WorkerGroup, tmp_path: Path, family: str, chat: bool) -> None:
    """The model's own score of each text, whatever it was padded with beside others; a decoder's bias subtracted."""
    more = {"reward_bias": 0.25} if family == "llama" else {}
    folder = save_foreign(tmp_path / "reward", family, **more)
    found = [score for own in two_ranks.run(scores, {"init": folder, "chat_template": chat}) for score in own]
    expected = expected_scores(folder, chat)
    assert max(expected) - min(expected) > 0.05
    assert found == pytest.approx(expected, abs=2e-5)


def error_of(world: World, settings: dict[str, Any]) -> str:
    try:
        scores(world, settings)
    except (SettingError, UserError) as error:
        return f"{getattr(error, 'field', '')} {error}"
    return ""


def test_what_cannot_score_is_one_line_on_every_rank(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    two = save_foreign(tmp_path / "two", "bert", num_labels=2)
    short = save_foreign(tmp_path / "short", "bert", max_position_embeddings=16)
    for told in two_ranks.run(error_of, {"init": two}):
        assert "has 2 outputs; a reward model has 1" in told
    for told in two_ranks.run(error_of, {"init": short}):
        assert "which has 16 positions: lower data.max_prompt_tokens" in told
    here = "tests.rlhf.test_rewards"
    for name, says in (
        ("fails_somewhere", "failed: ValueError: no far"),
        ("one_too_few", "gave 2 scores for 3 responses"),
        ("not_a_number", "gave nan for the response to rows.jsonl:2"),
    ):
        for told in two_ranks.run(error_of, {"init": f"{here}:{name}"}):
            assert f"reward.init: {here}:{name} {says}" in told


def length_and_number(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    for prompt, row in zip(prompts, rows, strict=True):
        assert prompt == f"Q: {row['prompt']} A:"
    return [len(response) + 100 * row["number"] for response, row in zip(responses, rows, strict=True)]


def fails_somewhere(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    if any("far" in response for response in responses):
        raise ValueError("no far\nplace")
    return [0.0] * len(responses)


def one_too_few(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    return [0.0] * min(2, len(rows))


def not_a_number(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    return [float("nan") if row["number"] == 1 else 0.0 for row in rows]


def vowels(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    assert all("answer" in row for row in rows)
    return [float(sum(response.count(letter) for letter in "aeiou")) for response in responses]


def test_a_function_sees_prompts_responses_and_rows(two_ranks: WorkerGroup) -> None:
    found = two_ranks.run(scores, {"init": "tests.rlhf.test_rewards:length_and_number"})
    assert [score for own in found for score in own] == [len(text) + 100 * n for n, text in enumerate(RESPONSES)]


def run_ppo(world: World, values: dict[str, Any]) -> list[dict[str, float]]:
    report = Recorder()
    ppo(validate("ppo", values), report)  # type: ignore[arg-type]
    return report.metrics


def test_ppo_with_a_function_and_with_another_s_reward_model(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    """The critic starts from the policy with a new head; the held-out prompts are scored too."""
    values = ppo_values(tmp_path, ppo={"episodes": 8, "batch_size": 8, "minibatches": 1})
    values = changed(values, critic={"init": values["policy"]["init"]})
    for number, init in enumerate(("tests.rlhf.test_rewards:vowels", save_foreign(tmp_path / "foreign", "gpt2"))):
        own = changed(values, reward={"init": init}, run={"folder": str(tmp_path / f"run-{number}")})
        for metrics in two_ranks.run(run_ppo, own):
            assert len(metrics) == 1
            assert metrics[0]["validation/scores"] != 0
            assert metrics[0]["objective/scores"] != 0
        assert (tmp_path / f"run-{number}/critic/config.json").exists()


def test_a_prompt_that_is_held_out_and_trained_on_is_not_told_apart_by_a_function() -> None:
    """Unless its fields are the same, in which case it does not matter which one is meant."""
    tokenizer, rows = asked_rows()
    rollouts = made_rollouts(tokenizer, rows)
    other = [PromptRow(row.id, row.tokens, row.text, {**row.extra, "number": 9}, "held.jsonl:1") for row in rows]
    Asked(tokenizer, Keys(), rows, rows).require_one_row_each()
    with pytest.raises(UserError, match=r"held.jsonl:1: asks what rows.jsonl:1 asks, with other fields"):
        Asked(tokenizer, Keys(), rows, other).require_one_row_each()
    assert Asked(tokenizer, Keys(), rows, other).rows(rollouts) == rows


def test_functions_by_name() -> None:
    assert load_function("tests.rlhf.test_rewards:vowels", "reward.init") is vowels
    assert [names_function(name) for name in ("a.b:c", "owner/name", "runs/a:b", "folder", "a.b:c.d")] == [
        True, False, False, False, False,
    ]  # fmt: skip
    wrong = {"no.such:thing": "No module named", "math:nothing": "no attribute", "math:pi": "is a float"}
    for name, says in wrong.items():
        with pytest.raises(SettingError, match=says):
            load_function(name, "reward.init")
