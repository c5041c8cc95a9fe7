"""docs/quickstart.md, followed to the letter: its files written, its commands run, in its order."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rlhf.tiny import prompt_rows, save_policy, text_rows, write_jsonl

TEXT = (Path(__file__).parents[2] / "docs/quickstart.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(yaml|sh)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader stands, with the files that the page asks for."""
    folder = tmp_path_factory.mktemp("quickstart")
    save_policy(folder / "my-sft")
    rows = prompt_rows(40)
    write_jsonl(folder / "prompts.jsonl", rows[:32])
    write_jsonl(folder / "held-out.jsonl", rows[32:])
    pairs = [{"prompt": row["prompt"], "chosen": " a cat", "rejected": f" {row['answer']} dogs"} for row in rows]
    write_jsonl(folder / "comparisons.jsonl", pairs[:24])
    write_jsonl(folder / "comparisons-held-out.jsonl", pairs[24:])
    write_jsonl(folder / "pretraining.jsonl", text_rows(40))
    return folder


def gearshift(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    words = line.split()
    assert words[0] == "gearshift"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gearshift.launch", *words[1:]]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)


def test_every_command_does_what_the_page_says(folder: Path) -> None:
    ran = []
    for kind, block in BLOCKS:
        if kind == "yaml":
            (folder / block.split("\n", 1)[0].removeprefix("# ")).write_text(block, encoding="utf-8")
            continue
        for line in block.splitlines():
            done = gearshift(folder, line)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            ran.append(line.split()[1])
    assert ran == ["reward", "plan", "doctor", "ppo", "report", "ppo", "verify", "export", "compare", "report"]
    for name in ("runs/mine/report.html", "runs/mine/best/model/config.json", "exported/model.safetensors"):
        assert (folder / name).is_file(), name
    assert len((folder / "runs/mine/metrics.jsonl").read_text().splitlines()) == 48 // 8
    assert set(json.loads((folder / "runs/compare/systems.json").read_text())) == {"sft", "mine"}
    table = (folder / "runs/compare/systems.md").read_text()
    assert "| mine |" in table
    assert (folder / "runs/compare/report.html").is_file()
