"""What is drawn is what the files say."""

import json
from pathlib import Path

import pytest

from gearshift.launch.report import main
from gearshift.launch.report.material import Run, Series, read_compare, read_stages
from gearshift.launch.report.measures import Missing, kind_scores, paired, phase_seconds
from gearshift.launch.report.policy_figures import (
    draw_learning,
    draw_pretraining_loss,
    over_optimisation,
    panels,
)
from gearshift.launch.report.style import new_figure
from gearshift.launch.report.system_figures import against_kl, draw_true_scores, scores
from gearshift.launch.report.tables import sample_groups, system_rows

from .report_files import RIGHT, edit_metrics, jsonl

pytestmark = pytest.mark.usefixtures("coarse_pictures")


def test_curves_hold_the_values_of_the_files(demo: Path) -> None:
    edit_metrics(demo / "ppo" / "metrics.jsonl", lambda line: line.update({"objective/scores": line["step"] * 2.0}))
    material = read_stages(demo)
    score, kl = new_figure().subplots(2, 1)
    draw_learning(material, score, kl)
    assert list(score.lines[0].get_xdata()) == [64.0 * i for i in range(1, 9)]
    assert list(score.lines[0].get_ydata()) == [2.0 * i for i in range(1, 9)]
    assert kl.get_xlabel() == "episodes"

    loss = new_figure().subplots()
    draw_pretraining_loss(material, loss)
    drawn = [float(line.get_ydata()[-1]) for line in loss.lines]  # type: ignore[index, arg-type]
    last = [material.runs[name].last("loss/pretraining_heldout") for name in ("ppo", "ppo-ptx")]
    assert drawn == pytest.approx([*last, 1.9 + 0.05 / 4, 1.9 + 0.46 / 4])


def test_bars_hold_the_true_scores(demo: Path) -> None:
    axes = new_figure().subplots()
    draw_true_scores(read_stages(demo), axes)
    assert [bar.get_width() for bar in axes.patches] == list(RIGHT.values())  # type: ignore[attr-defined]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["Base", "SFT", "PPO", "PPO-ptx"]


def test_the_score_is_drawn_against_the_root_of_the_kl(demo: Path) -> None:
    lines = [{"step": i, "objective/scores": 2.0 * i, "objective/kl": float(i * i)} for i in (1, 2, 3)]
    jsonl(demo / "ppo" / "metrics.jsonl", [*lines, {"step": 4, "objective/scores": 9.0}])
    course = over_optimisation(read_stages(demo)).figure.axes[0].lines[0]
    assert (list(course.get_xdata()), list(course.get_ydata())) == ([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    points = against_kl(read_stages(demo)).figure.axes[0]
    dots = {line.get_xydata()[0].tolist()[1]: line.get_xydata()[0].tolist()[0] for line in points.lines
            if line.get_marker() == "o"}  # fmt: skip
    assert dots == pytest.approx({0.05: 8.7531**0.5, 0.46: 0.0, 0.78: 8.7531**0.5, 0.74: 8.7531**0.5})


def test_metrics_are_paired_by_step() -> None:
    run = Run("ppo", metrics=({"step": 1, "a": 1.0}, {"step": 2, "a": 2.0, "b": 5.0}, {"step": 3, "b": 6.0}))
    assert paired(run, "a", "b") == (Series((2,), (2.0,)), Series((2,), (5.0,)))
    assert paired(run, "a", "c") == (Series((), ()), Series((), ()))


def test_wins_are_dots_with_their_intervals(demo: Path) -> None:
    wins = scores(read_stages(demo)).figure.axes[1]
    assert wins.get_title() == "Wins against SFT by reward-model score"
    spans = [line.get_xdata() for line in wins.lines if len(line.get_xdata()) == 2]  # type: ignore[arg-type]
    assert [list(span) for span in spans[:1]] == [pytest.approx([0.2 + 0.025 - 0.03, 0.2 + 0.025 + 0.03])]
    assert [tick.get_text() for tick in wins.get_yticklabels()] == ["Base", "SFT", "PPO", "PPO-ptx"]


def test_memory_is_drawn_where_it_was_logged_and_otherwise_not_missed(demo: Path) -> None:
    with pytest.raises(Missing):
        panels("memory")(read_stages(demo))
    for name in ("ppo", "ppo-ptx"):
        edit_metrics(demo / name / "metrics.jsonl", lambda line: line.update({"memory/peak_gib": 1.5}))
    drawn = panels("memory")(read_stages(demo)).figure.axes[0]
    assert set(drawn.lines[0].get_ydata()) == {1.5}
    main([str(demo / "ppo")])
    assert '<figure id="memory">' in (demo / "ppo" / "report.html").read_text()


def test_a_panel_that_no_run_logged_is_left_out_of_its_figure(demo: Path) -> None:
    for name in ("ppo", "ppo-ptx"):
        edit_metrics(demo / name / "metrics.jsonl", lambda line: line.pop("policy/entropy_avg"))
    figure = panels("entropy")(read_stages(demo)).figure
    assert [axes.get_title() for axes in figure.axes] == ["Minus log-probability of an answer, nats"]


def test_samples_over_time_are_of_steps_at_equal_distances() -> None:
    samples = tuple({"step": step, "prompt": "p", "response": f"r{step}"} for step in range(10, 110, 10) for _ in "ab")
    groups = sample_groups(Run("ppo", samples=samples))
    assert [heading for heading, _ in groups] == ["Step 10", "Step 30", "Step 50", "Step 80", "Step 100"]
    assert groups[1][1] == [("p", "r30", "")] * 2
    assert sample_groups(Run("ppo")) == []
    assert len(sample_groups(Run("ppo", samples=samples[:2]))) == 1


def test_the_other_systems_of_the_paper_have_names_order_and_colours_of_their_own(demo: Path) -> None:
    names = ("rloo", "mine", "t0", "prompted", "grpo", "flan", "base")
    (demo / "compare" / "systems.json").write_text(json.dumps({name: {"score": 1.0} for name in names}))
    rows = system_rows(read_compare(demo / "compare"))
    assert [row.label for row in rows] == ["Base", "Prompted", "FLAN", "T0", "GRPO", "RLOO", "mine"]
    assert len({row.colour for row in rows}) == 7


def test_scores_by_kind_are_means_with_their_normal_interval(demo: Path) -> None:
    answers = [{"system": "sft", "id": i, "prompt": "", "response": "", "kind": "add", "true_score": s}
               for i, s in enumerate((1.0, 0.0, 1.0, 1.0))]  # fmt: skip
    jsonl(demo / "compare" / "answers.jsonl", answers)
    mean, interval = kind_scores(read_stages(demo))["add"]["sft"]
    assert mean == 0.75
    assert interval == pytest.approx(1.96 * 0.5 / 2)  # s = sqrt(0.75 / 3) = 0.5, n = 4


def test_phases_are_seconds_and_the_rest_of_the_step(demo: Path) -> None:
    line = {"step": 3, "timing/generation": 1.0, "timing/shift": 0.25, "timing/score": 0.5, "timing/train": 2.0}
    jsonl(demo / "ppo" / "metrics.jsonl", [line | {"timing/step": 4.0}, {"step": 4, "timing/generation": 1.0}])
    steps, seconds = phase_seconds(read_stages(demo).runs["ppo"])
    assert steps == (3,)
    assert seconds == {"generation": [1.0], "shift": [0.25], "score": [0.5], "train": [2.0], "other": [0.25]}
