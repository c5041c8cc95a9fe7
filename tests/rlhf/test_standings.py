"""A system's figures from its answers, and the table that shows them."""

from typing import Any

import pytest

from gearshift.rlhf.standings import markdown, summary, win_rates
from gearshift.rlhf.statistics import bootstrap_mean

R, SEED = 500, 3


def answer(score: float, kl: float, length: int, finished: bool, response: str = "", **more: float) -> dict[str, Any]:
    return {"id": 0, "score": score, "kl": kl, "length": length, "finished": finished, "response": response, **more}


def test_summary_of_a_list_made_by_hand() -> None:
    answers = [
        answer(1.0, 0.5, 3, True, "a b a", true_score=1.0),
        answer(-2.0, 1.5, 8, False, "a b", true_score=0.0),
        answer(4.0, 0.0, 2, True, "", true_score=1.0),
        answer(0.0, -1.0, 3, True, "c", true_score=1.0),
    ]
    true = bootstrap_mean([1.0, 0.0, 1.0, 1.0], R, SEED)
    assert summary(answers, 2.5, R, SEED) == pytest.approx(
        {
            **bootstrap_mean([1.0, -2.0, 4.0, 0.0], R, SEED).fields("score"),
            "true_score": 0.75,
            "true_score_low": true.low,
            "true_score_high": true.high,
            "kl": 0.25,
            "length": 4.0,
            "eos_rate": 0.75,
            "distinct_1": 3 / 6,
            "distinct_2": 2 / 6,
            "pretraining_loss": 2.5,
        }
    )


def test_figures_that_nothing_measured_are_left_out() -> None:
    found = summary([answer(1, 0, 1, True)], None, R, SEED)
    assert set(found) == {
        "score", "score_low", "score_high", "kl", "length", "eos_rate", "distinct_1", "distinct_2"
    }  # fmt: skip
    assert set(win_rates([answer(1, 0, 1, True)], [answer(0, 0, 1, True, "b")], R, SEED)) == {
        "win_rate", "win_rate_low", "win_rate_high"
    }  # fmt: skip


def test_win_rates_are_paired_by_prompt_and_the_same_answer_is_a_tie() -> None:
    """By score: won, tied (the same text, scores a rounding apart), lost, lost. By true score: tied but for one won."""
    own = [answer(s, 0, 1, True, text, true_score=t) for s, text, t in
           ((1.0, "a", 1.0), (0.50001, "b", 1.0), (0.0, "c", 0.0), (0.0, "d", 1.0))]  # fmt: skip
    others = [answer(s, 0, 1, True, text, true_score=t) for s, text, t in
              ((0.0, "x", 1.0), (0.5, "b", 1.0), (1.0, "y", 0.0), (2.0, "z", 0.0))]  # fmt: skip
    found = win_rates(own, others, R, SEED)
    assert found["win_rate"] == pytest.approx(1.5 / 4)
    assert found["true_win_rate"] == pytest.approx(2.5 / 4)
    assert (found["win_rate_low"], found["win_rate_high"]) == pytest.approx(
        (lambda e: (e.low, e.high))(bootstrap_mean([1.0, 0.5, 0.0, 0.0], R, SEED))
    )
    back = win_rates(others, own, R, SEED)
    assert back["win_rate"] == pytest.approx(1 - found["win_rate"])


def test_answers_to_other_prompts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="the same prompts"):
        win_rates([answer(1, 0, 1, True)], [{**answer(1, 0, 1, True), "id": 1}], R, SEED)


def test_the_table_in_markdown() -> None:
    systems: dict[str, dict[str, Any]] = {
        "sft": {"score": 0.5, "score_low": 0.25, "score_high": 0.75, "kl": 0.0},
        "a|b": {
            "score": 1.0,
            "kl": 2.345,
            "eos_rate": 1.0,
            "prefixes": [
                {"prefix": "Q|\n", "score": 1.5, "score_low": 1.0, "score_high": 2.0, "chosen": True},
                {"prefix": "", "score": 1.0, "chosen": False},
            ],
        },
    }
    assert markdown(systems, "sft").splitlines() == [
        "| system | reward score | KL, nats | EOS rate |",
        "|---|---:|---:|---:|",
        "| sft | 0.500 [0.250, 0.750] | 0.00 | - |",
        "| a\\|b | 1.000 | 2.35 | 1.000 |",
        "",
        "In brackets: 95% bootstrap intervals over prompts. "
        "Wins are over the answers of sft to the same prompts, a tie half.",
        "",
        "Prefixes tried for a|b, by reward score on the selection prompts:",
        "",
        "| prefix | reward score | chosen |",
        "|---|---:|---|",
        '| `"Q\\|\\n"` | 1.500 [1.000, 2.000] | yes |',
        '| `""` | 1.000 |  |',
    ]
