"""The report shows what the files say, nothing else, and nothing in them becomes markup."""

import base64
import json
import math
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gearshift.errors import UserError
from gearshift.launch.report import demo_report, main
from gearshift.launch.report.figures import (
    draw_learning,
    draw_pretraining_loss,
    draw_true_scores,
    explained_variance,
)
from gearshift.launch.report.material import read_run, read_stages
from gearshift.launch.report.measures import Missing, kind_scores, phase_seconds
from gearshift.launch.report.style import new_figure, smooth, spread
from gearshift.launch.report.tables import NONE, duration, headline, latest_values, prompt_rows, system_rows

KINDS = ("add", "copy", "reverse", "sort")
RIGHT = {"base": 0.05, "sft": 0.46, "ppo": 0.78, "ppo-ptx": 0.74}


def jsonl(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_demo(folder: Path, iterations: int = 8, prompts: int = 8) -> Path:
    """A demo folder with curves of about the real shape; every number is a function of the seed 0."""
    rng = random.Random(0)
    for stage, start, end in (("pretrain", 5.5, 1.9), ("sft", 2.4, 0.6), ("reward", 0.72, 0.44)):
        lines: list[dict[str, Any]] = []
        for step in range(1, iterations + 1):
            loss = end + (start - end) * math.exp(-4 * step / iterations)
            lines.append({"step": step, "loss/train": loss + rng.gauss(0, 0.03), "timing/step": 0.2})
            if step % max(1, iterations // 6) == 0:
                lines.append({"step": step, "loss/validation": loss + 0.05})
                if stage == "reward":
                    lines[-1]["reward/accuracy"] = 0.85 - 0.35 * math.exp(-3 * step / iterations)
        jsonl(folder / stage / "metrics.jsonl", lines)
        (folder / stage / "config.yaml").write_text(f"run:\n  folder: {stage}\ntrain:\n  batch_size: 32\n")
    for name, drift in (("ppo", 0.55), ("ppo-ptx", 0.12)):
        jsonl(folder / name / "metrics.jsonl", [ppo_line(i, iterations, drift, rng) for i in range(1, iterations + 1)])
        (folder / name / "config.yaml").write_text(f"run:\n  folder: {name}\nppo:\n  batch_size: 64\n")
        samples = [{"step": i, "prompt": f"sort {i} 2", "response": "2 3", "score": 0.5, "kl": 1.5, "finished": i > 1}
                   for i in (1, iterations) for _ in range(3)]  # fmt: skip
        jsonl(folder / name / "samples.jsonl", samples)
    write_compare(folder / "compare", prompts, rng)
    checks = [
        {"name": "SFT's true score is above the base model's", "passed": True, "detail": "0.460 > 0.050 + 0.04"},
        {"name": "PPO's true score is above SFT's", "passed": True, "detail": "0.780 > 0.460 + 0.044"},
        {"name": "mean KL per response stays under its bound", "passed": False, "detail": "31.2 > 30 nats"},
    ]
    (folder / "checks.json").write_text(json.dumps(checks))
    seconds = {
        "world": 3.2,
        "pretrain": 64.0,
        "sft": 41.0,
        "reward": 38.5,
        "ppo": 122.4,
        "ppo-ptx": 141.9,
        "compare": 20,
    }
    (folder / "timings.json").write_text(json.dumps(seconds))
    (folder / "world").mkdir()
    about = {"kinds": list(KINDS), "labeler_error_rate": 0.1, "test_prompts": prompts, "ranks": 2}
    (folder / "world" / "about.json").write_text(json.dumps(about))
    return folder


def ppo_line(i: int, iterations: int, drift: float, rng: random.Random) -> dict[str, Any]:
    done = 1 - math.exp(-3 * i / iterations)
    line = {
        "step": i,
        "objective/episodes": 64 * i,
        "objective/scores": -0.4 + 2.1 * done + rng.gauss(0, 0.12),
        "objective/kl": 9 * done + abs(rng.gauss(0, 0.3)),
        "objective/entropy": 20 - 8 * done,
        "policy/approxkl_avg": 0.01 + abs(rng.gauss(0, 0.002)),
        "policy/clipfrac_avg": 0.08 + rng.gauss(0, 0.01),
        "loss/policy_avg": rng.gauss(-0.01, 0.01),
        "loss/value_avg": 0.4 * (1 - 0.8 * done),
        "val/ratio": 1 + rng.gauss(0, 0.002),
        "critic/explained_variance": 0.1 + 0.7 * done + rng.gauss(0, 0.04),
        "rollout/logprob_gap": 4e-7,
        "timing/generation": 0.55 + rng.gauss(0, 0.03),
        "timing/shift": 0.06,
        "timing/score": 0.17 + rng.gauss(0, 0.01),
        "timing/train": 0.5 + rng.gauss(0, 0.03),
        "timing/step": 1.4,
    }
    if i == 1 or i % max(1, iterations // 8) == 0:
        line["loss/pretraining_heldout"] = 1.98 + drift * done
    return line


def write_compare(folder: Path, prompts: int, rng: random.Random) -> None:
    answers: list[dict[str, Any]] = []
    systems = {}
    for name, right in RIGHT.items():
        for i in range(prompts):
            hit = rng.random() < right
            digits = [rng.randrange(10) for _ in range(5)]
            want = " ".join(map(str, sorted(digits)))
            answer = {
                "system": name,
                "id": i,
                "prompt": f"Instruction: {KINDS[i % 4]} {' '.join(map(str, digits))}\nAnswer:",
            }
            answer |= {
                "response": want if hit else "I do not <script>alert('know')</script>",
                "score": rng.gauss(right, 1),
            }
            answer |= {"kl": 4.0, "length": 9, "finished": hit, "true_score": float(hit), "kind": KINDS[i % 4]}
            answers.append(answer)
        systems[name] = {"true_score": right, "true_score_ci95": 0.044, "score": 3 * right - 1.234, "length": 9.5}
        systems[name] |= {"kl": 0.0 if name == "sft" else 8.7531, "pretraining_loss": 1.9 + right / 4}
    jsonl(folder / "answers.jsonl", answers)
    (folder / "systems.json").write_text(json.dumps(systems))


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at these pictures: fewer pixels make the tests three times as fast."""
    monkeypatch.setattr("gearshift.launch.report.style.DPI", 40)


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return write_demo(tmp_path / "demo")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder, page) of one complete report; tests only read it."""
    folder = write_demo(tmp_path_factory.mktemp("rendered") / "demo")
    return folder, demo_report(folder).read_text(encoding="utf-8")


def edit_metrics(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        change(line)
    jsonl(path, lines)


def test_every_picture_is_on_disk_and_in_the_page(rendered: tuple[Path, str]) -> None:
    folder, page = rendered
    names = {path.stem for path in (folder / "report").glob("*.png")}
    assert names == {"summary", "learning", "true_scores", "pretraining_loss", "explained_variance", "phases", "stages"}
    embedded = {base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([\w+/=]+)", page)}
    assert embedded == {(folder / "report" / f"{name}.png").read_bytes() for name in names - {"summary"}}
    assert "is left out" not in page


def test_summary_has_the_size_of_a_readme_picture(rendered: tuple[Path, str]) -> None:
    header = (rendered[0] / "report" / "summary.png").read_bytes()[16:24]
    assert struct.unpack(">II", header) == (1200, 700)


def test_page_needs_nothing_from_outside(rendered: tuple[Path, str]) -> None:
    page = rendered[1]
    assert not re.search(r"https?://|<script|<link(?![^>]*data:)|@import|url\(", page)


def test_answers_are_escaped(rendered: tuple[Path, str]) -> None:
    page = rendered[1]
    assert "I do not &lt;script&gt;alert(&#39;know&#39;)&lt;/script&gt;" in page


def test_numbers_of_systems_checks_timings_and_world_are_in_the_page(rendered: tuple[Path, str]) -> None:
    page = rendered[1]
    assert "78.0% ± 4.4" in page  # ppo's true score
    assert "<td>8.75</td>" in page  # its KL
    assert "<td>1.11</td>" in page  # its reward score, 3 * 0.78 - 1.234
    assert "<td>2.095</td>" in page  # its loss on pretraining text, 1.9 + 0.78 / 4
    assert "1 of 3 checks failed" in page
    assert "31.2 &gt; 30 nats" in page
    assert page.count("✓ passed") == 2
    assert page.count("✗ failed") == 1
    assert "2 min 22 s" in page
    assert "7 min 11 s in all" in page
    assert "labeler error rate" in page
    assert page.count(": config.yaml</summary>") == 5
    assert "batch_size: 64" in page


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


def test_a_missing_metric_leaves_its_figure_out_and_says_so(demo: Path) -> None:
    (demo / "report").mkdir()
    (demo / "report" / "explained_variance.png").write_bytes(b"of an earlier report")
    for name in ("ppo", "ppo-ptx"):
        edit_metrics(demo / name / "metrics.jsonl", lambda line: line.pop("critic/explained_variance"))
    edit_metrics(demo / "ppo" / "metrics.jsonl", lambda line: line.pop("loss/pretraining_heldout", None))
    page = demo_report(demo).read_text()
    assert "<strong>Critic</strong> is left out: no run here logged critic/explained_variance." in page
    assert "PPO has no loss/pretraining_heldout." in page
    assert not (demo / "report" / "explained_variance.png").exists()
    with pytest.raises(Missing, match=r"critic/explained_variance"):
        explained_variance(read_stages(demo))


def test_nothing_measured_still_makes_a_page(demo: Path) -> None:
    for path in [*demo.glob("*/metrics.jsonl"), *demo.glob("compare/*"), *demo.glob("*.json")]:
        path.unlink()
    page = demo_report(demo).read_text()
    assert page.count("is left out") == 6
    assert "There is no checks.json" in page
    assert "There is no compare/systems.json" in page
    assert not list((demo / "report").iterdir())


@pytest.mark.parametrize("name", ["pretrain", "ppo-ptx", "compare"])
def test_a_missing_folder_is_named(demo: Path, name: str) -> None:
    (demo / name).rename(demo / "elsewhere")
    with pytest.raises(UserError, match=re.escape(f"{demo / name}: no such folder")):
        demo_report(demo)


def test_command_reports_a_run(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(demo / "ppo")]) == 0
    path = demo / "ppo" / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    page = path.read_text()
    assert "Samples, step 1" in page
    assert "Samples, step 8" in page
    assert "cut at the limit" in page
    assert {p.stem for p in (demo / "ppo" / "report").glob("*.png")} >= {"learning", "phases", "metrics_policy"}
    assert "is left out" not in page
    run = read_run(demo / "ppo").runs["ppo"]
    assert ("rollout/logprob_gap", "4e-07") in latest_values(run)


def test_command_reports_a_stage_a_comparison_and_some_stages(demo: Path) -> None:
    main([str(demo / "reward")])
    assert {p.stem for p in (demo / "reward" / "report").glob("*.png")} == {"stages", "metrics_timing"}
    edit_metrics(
        demo / "compare" / "answers.jsonl", lambda line: line.update(kind=r"$\nope$")
    )  # words, not mathematics
    main([str(demo / "compare")])
    assert {p.stem for p in (demo / "compare" / "report").glob("*.png")} == {"true_scores"}
    (demo / "ppo").rename(demo / "elsewhere")
    main([str(demo)])
    assert (demo / "report" / "learning.png").is_file()


@pytest.mark.parametrize("place", ["nowhere", "world"])
def test_command_refuses_a_folder_without_anything(demo: Path, place: str) -> None:
    with pytest.raises(UserError, match=f"{place}: no"):
        main([str(demo / place)])


def test_broken_lines_are_named_but_an_unfinished_last_one_is_not(demo: Path) -> None:
    path = demo / "ppo" / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 9, "objective/sc')
    assert read_run(demo / "ppo").runs["ppo"].series("objective/scores").steps[-1] == 8  # type: ignore[union-attr]
    path.write_text('{"step": 9, "objective/sc\n' + whole)
    with pytest.raises(UserError, match=r"metrics.jsonl, line 1: not JSON"):
        read_run(demo / "ppo")
    path.write_text('{"loss/train": 1.0}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 1: no number under 'step'"):
        read_run(demo / "ppo")


def test_series_keeps_the_later_line_of_a_step_and_drops_what_is_not_finite(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"step": 2, "a": 1.0},
        {"step": 1, "a": 5},
        {"step": 2, "a": 3.0},
        {"step": 3, "a": math.nan},
    ]
    jsonl(tmp_path / "metrics.jsonl", lines)
    series = read_run(tmp_path).runs[tmp_path.name].series("a")
    assert series is not None
    assert (series.steps, series.values) == ((1, 2), (5.0, 3.0))


def test_side_by_side_answers_take_the_kinds_in_turn_and_mark_them(demo: Path) -> None:
    answers: list[dict[str, Any]] = [
        {"system": name, "id": i, "prompt": f"p{i}", "response": f"{name} {i}", "kind": kind, "true_score": score}
        for i, (kind, score) in enumerate((("a", 1.0), ("a", 0.0), ("b", 0.25), ("b", True)))
        for name in ("ppo", "sft")
        if (i, name) != (3, "sft")  # a prompt that one system did not answer is not shown
    ]
    jsonl(demo / "compare" / "answers.jsonl", answers)
    rows = prompt_rows(read_stages(demo))
    assert [row.prompt for row in rows] == ["p0", "p2", "p1"]
    assert [cell.response for cell in rows[0].cells] == ["sft 0", "ppo 0"]
    assert [row.cells[0].verdict for row in rows] == ["right", "0.250", "wrong"]


def test_sentences_and_rows_follow_the_numbers(demo: Path) -> None:
    material = read_stages(demo)
    assert headline(material)[0] == (
        "On 8 held-out prompts, right answers: Base 5.0%, SFT 46.0%, PPO 78.0% and PPO-ptx 74.0%."
    )
    systems = {"mine": {"score": 2.5, "true_score": 7.25, "kl": None}, "base": {"true_score": 1.5}}
    (demo / "compare" / "systems.json").write_text(json.dumps(systems))
    rows = system_rows(read_stages(demo))
    assert [(row.label, row.cells) for row in rows] == [("Base", ["1.500", NONE]), ("mine", ["7.250", "2.50"])]


def test_helpers() -> None:
    assert smooth([0.0, 3.0, 6.0, 3.0], 3) == [1.5, 3.0, 4.0, 4.5]
    assert spread([0.1, 0.5, 0.52], 0.1) == pytest.approx([0.1, 0.46, 0.56])
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert [duration(s) for s in (4.2, 59.97, 185, 7800)] == ["4.2 s", "1 min 00 s", "3 min 05 s", "2 h 10 min"]
