"""What docs/instructgpt.md and docs/multi-node.md name is there: files, settings, defaults, options."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from gearshift.launch.config import CONFIGS, fields
from gearshift.launch.overrides import LAUNCHER
from gearshift.launch.world_table import world_table

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/instructgpt.md").read_text(encoding="utf-8")
PLACES = sorted(set(re.findall(r"`(gearshift/[\w/]+\.py): (\w+)`", TEXT)))
SETTINGS = sorted(set(re.findall(r"`(\w+): ([\w.]+)`(?: = (\[[^\]]*\]|[^,|\s]+))?", TEXT)))


def test_it_names_places_and_settings() -> None:
    """So that a change of the page's form does not leave the tests below with nothing to look at."""
    assert len(PLACES) >= 20
    assert len(SETTINGS) >= 30
    assert sum(1 for *_, default in SETTINGS if default) >= 30


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_a_place_is_there(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


@pytest.mark.parametrize(("command", "field", "default"), SETTINGS)
def test_a_setting_has_its_default(command: str, field: str, default: str) -> None:
    known = {name: given for name, _, given, _ in fields(CONFIGS[command])}
    assert field in known
    if default:
        assert yaml.safe_load(known[field]) == yaml.safe_load(default)


def test_the_page_on_several_hosts() -> None:
    """Its table is what is printed, its options and settings are there."""
    page = (ROOT / "docs/multi-node.md").read_text(encoding="utf-8")
    assert "".join(f"    {line}\n" for line in world_table(["gear-a"] * 2 + ["gear-b"] * 2, 2)) in page
    options = re.search(r"goes on to it: (.*?)\. A value", page, re.DOTALL)
    assert options is not None
    assert re.findall(r"`--(\w+)`", options[1]) == list(LAUNCHER)
    known = {name for name, *_ in fields(CONFIGS["ppo"])}
    settings = set(re.findall(r"`((?:run|rollout|checkpoint)\.\w+)(?:: \d+)?`", page))
    assert len(settings) >= 5
    assert settings <= known
