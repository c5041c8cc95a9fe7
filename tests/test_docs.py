"""The pages: the files, names, settings, defaults, commands and messages that they give are there."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from gearshift.launch.cli import COMMANDS
from gearshift.launch.config import CONFIGS, fields
from gearshift.launch.overrides import LAUNCHER
from gearshift.launch.reference import page
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


# --- the other pages -------------------------------------------------------------------------------------------------

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "gearshift").rglob("*.py")))
ALL_FIELDS = {name for config in CONFIGS.values() for name, *_ in fields(config)}


def test_the_configuration_page_is_of_this_config() -> None:
    """Else: python -m gearshift.launch.reference > docs/configuration.md."""
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_and_settings_that_a_page_names_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:gearshift|tests|benchmarks|configs|docs)/[\w/.-]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\((?!http)([\w/.-]+)\)", text):
        assert (path.parent / name).exists(), name
    sections = "|".join(sorted({name.split(".")[0] for name in ALL_FIELDS} - {"systems", "deepspeed"}))
    for name in re.findall(rf"`(?:--)?((?:{sections})\.[a-z_]+(?:\.[a-z_]+)*)(?::| |`)", text):
        assert name in ALL_FIELDS or any(known.startswith(f"{name}.") for known in ALL_FIELDS), name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_that_a_page_names_are_there(path: Path) -> None:
    for name in re.findall(r"^(?:    )?gearshift ([a-z]+)", path.read_text(encoding="utf-8"), re.MULTILINE):
        assert name in COMMANDS, name


def test_messages_in_the_page_on_troubles_are_told_somewhere() -> None:
    cells = re.findall(
        r"^\| `([^`|]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(cells) > 6
    for cell in cells:
        for part in re.split(r"\.\.\.|\b[NR]\b", cell):
            assert part.strip(" ;,:") in SOURCE, part


def test_the_page_on_several_hosts() -> None:
    """Its table is what is printed, its options and settings are there."""
    text = (ROOT / "docs/multi-node.md").read_text(encoding="utf-8")
    assert "".join(f"    {line}\n" for line in world_table(["gear-a"] * 2 + ["gear-b"] * 2, 2)) in text
    options = re.search(r"goes on to it: (.*?)\. A value", text, re.DOTALL)
    assert options is not None
    assert re.findall(r"`--(\w+)`", options[1]) == list(LAUNCHER)
    known = {name for name, *_ in fields(CONFIGS["ppo"])}
    settings = set(re.findall(r"`((?:run|rollout|checkpoint)\.\w+)(?:: \d+)?`", text))
    assert len(settings) >= 5
    assert settings <= known
