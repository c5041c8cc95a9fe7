"""What a rank shows the others at the start, and what it knows of them."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gearshift.engine import meeting
from gearshift.errors import Told, UserError
from gearshift.launch import joining
from gearshift.launch.config import load
from gearshift.launch.overrides import Arguments

from .conftest import example, write


def test_every_setting_is_shown(here: Path) -> None:
    facts = joining.facts_of(load("ppo", write(example("ppo"))))
    assert facts["config ppo.kl.coef"] == "0.02"
    assert facts["config data.train"] == '["prompts.jsonl"]'
    assert facts["config deepspeed"] == "{}"


def test_the_files_that_every_rank_reads_are_shown(here: Path) -> None:
    def shown() -> dict[str, str]:
        return joining.contents_of(load("ppo", write(example("ppo"))))

    before = shown()
    assert "config data.train: the SHA-256 of prompts.jsonl" in before
    assert "config policy.init: the SHA-256 of sft/config.json" in before
    assert not any("safetensors" in name for name in before)
    with open("prompts.jsonl", "a", encoding="utf-8") as file:
        file.write('{"prompt": "another"}\n')
    assert [name for name, digest in shown().items() if digest != before[name]] == [
        "config data.train: the SHA-256 of prompts.jsonl"
    ]


@pytest.mark.parametrize(("local_size", "error"), [("2", UserError), ("1", Told)])
def test_a_mistake_of_one_rank_is_told_to_the_others(
    here: Path, monkeypatch: pytest.MonkeyPatch, local_size: str, error: type[UserError]
) -> None:
    """Over several hosts; on one the launcher ends them."""
    shown: list[meeting.Card] = []

    def meet(card: meeting.Card, *more: Any) -> Any:
        shown.append(card)
        raise Told(card.problem)

    monkeypatch.setattr(meeting, "meet", meet)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_SIZE": local_size, "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        joining.join("ppo", Arguments(config="none.yaml"))
    assert type(caught.value) is error
    assert [card.problem for card in shown] == ([str(caught.value)] if error is Told else [])


def test_the_hosts_that_the_launcher_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = base64.urlsafe_b64encode(json.dumps({"a": [0, 1], "b": [3]}).encode()).decode()
    words = [sys.executable, "-c", "print(flush=True); input()", f"--world_info={slots}"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        monkeypatch.setattr(os, "getppid", lambda: process.pid)
        assert joining._hosts_of_launcher() == {0: "a", 1: "a", 2: "b"}
        process.kill()
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert joining._hosts_of_launcher() == {}


@pytest.mark.parametrize(("before", "after"), [(None, "eth7"), ("eth1", "eth1")])
def test_the_card_is_named_unless_it_is_set(monkeypatch: pytest.MonkeyPatch, before: str | None, after: str) -> None:
    monkeypatch.setattr(meeting, "interface_towards", lambda address: "eth7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", before or "")
    if before is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    for name, value in {"WORLD_SIZE": "2", "LOCAL_SIZE": "1", "MASTER_ADDR": "10.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    joining.name_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == after
