"""The report shows what the files say, nothing else, and nothing in them becomes markup."""

import base64
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from gearshift.errors import UserError
from gearshift.launch.report import demo_report, main
from gearshift.launch.report.material import read_run, read_stages
from gearshift.launch.report.measures import Missing
from gearshift.launch.report.policy_figures import (
    explained_variance,
)
from gearshift.launch.report.style import smooth, spread
from gearshift.launch.report.tables import (
    NONE,
    duration,
    headline,
    latest_values,
    prefix_rows,
    prompt_rows,
    system_rows,
)

from .report_files import edit_metrics, jsonl, write_demo

pytestmark = pytest.mark.usefixtures("coarse_pictures")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder, page) of one complete report; tests only read it."""
    folder = write_demo(tmp_path_factory.mktemp("rendered") / "demo")
    return folder, demo_report(folder).read_text(encoding="utf-8")


def test_every_picture_is_on_disk_and_in_the_page(rendered: tuple[Path, str]) -> None:
    folder, page = rendered
    names = {path.stem for path in (folder / "report").glob("*.png")}
    policy = {"learning", "over_optimisation", "pretraining_loss", "entropy", "lengths", "clipping"}
    systems = {"true_scores", "scores", "systems_kl", "texts"}
    assert names == policy | systems | {"summary", "explained_variance", "phases", "stages"}
    embedded = {base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([\w+/=]+)", page)}
    assert embedded == {(folder / "report" / f"{name}.png").read_bytes() for name in names - {"summary"}}
    assert "is left out" not in page
    assert "Memory" not in page  # which no run logged, and need not


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
    assert '<td>78.0%<span class="ends">73.6% to 82.4%</span></td>' in page  # ppo's true score
    assert '<td>59.0%<span class="ends">56.0% to 62.0%</span></td>' in page  # its wins
    assert "over the answers of SFT to the same prompts" in page
    assert "<td>0.00</td>" in page  # the KL of the SFT model, which rounding takes below 0
    assert "Q: &lt;b&gt;1&lt;/b&gt;" in page
    assert "<td>0.250 (0.125 to 0.500)</td><td>✓ chosen</td>" in page
    assert "<td>8.75</td>" in page  # its KL
    assert '<td>1.11<span class="ends">1.01 to 1.21</span></td>' in page  # its reward score, 3 * 0.78 - 1.234
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
    assert page.count("is left out") == 13
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
    assert [f"<summary>Step {i}</summary>" in page for i in range(1, 9)] == [i in (1, 3, 5, 6, 8) for i in range(1, 9)]
    assert "cut at the limit" in page
    assert {p.stem for p in (demo / "ppo" / "report").glob("*.png")} >= {"learning", "phases", "metrics_loss"}
    assert "is left out" not in page
    run = read_run(demo / "ppo").runs["ppo"]
    assert ("rollout/logprob_gap", "4e-07") in latest_values(run)


def test_command_reports_a_stage_a_comparison_and_some_stages(demo: Path) -> None:
    main([str(demo / "reward")])
    assert {p.stem for p in (demo / "reward" / "report").glob("*.png")} == {"stages", "metrics_timing"}
    edit_metrics(
        demo / "compare" / "answers.jsonl", lambda line: line.update(kind=r"$\nope$")
    )  # words, not mathematics
    jsonl(demo / "compare" / "metrics.jsonl", [{"step": 1, "base/score": 0.5}])  # a comparison logs too
    main([str(demo / "compare")])
    names = {p.stem for p in (demo / "compare" / "report").glob("*.png")}
    assert names == {"true_scores", "scores", "systems_kl", "texts"}
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
    assert [(row.label, row.cells) for row in rows] == [
        ("Base", [("1.500", ""), (NONE, "")]),
        ("mine", [("7.250", ""), ("2.50", "")]),
    ]
    assert prefix_rows(read_stages(demo)) == []


def test_helpers() -> None:
    assert smooth([0.0, 3.0, 6.0, 3.0], 3) == [1.5, 3.0, 4.0, 4.5]
    assert spread([0.1, 0.5, 0.52], 0.1) == pytest.approx([0.1, 0.46, 0.56])
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert [duration(s) for s in (4.2, 59.97, 185, 7800)] == ["4.2 s", "1 min 00 s", "3 min 05 s", "2 h 10 min"]
