"""docs/configuration.md: every field of every command's config, from the typed config itself.

python -m gearshift.launch.reference > docs/configuration.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import yaml

from gearshift.launch.config import CONFIGS, ORDER, fields

HEAD = """# Configuration

Every field of every command's YAML file, written by `python -m gearshift.launch.reference`. A field `section.name` can
also be given on the command line, `--section.name value`; `gearshift COMMAND --help` prints those of one command.
An unknown field, a wrong type or an impossible combination is one line and exit code 2, before any process starts.
"C.4" and the like name sections of InstructGPT's appendix (arXiv 2203.02155). Where the column of commands is empty,
all that have the section have the field.
"""


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for section in ORDER:
        users = [command for command in CONFIGS if section in CONFIGS[command].model_fields]
        if users:
            lines += [f"## {section}", "", f"Of {', '.join(f'`{user}`' for user in users)}.", ""]
            lines += ["| field | type | default | commands | what it is |", "|---|---|---|---|---|"]
            lines += list(_rows(section, users))
            lines += [""]
    return "\n".join(lines)


def _rows(section: str, users: list[str]) -> Iterator[str]:
    """A row for each field, and one for each way in which commands differ about it."""
    found: dict[str, dict[tuple[str, str, str], list[str]]] = {}
    for command in users:
        for name, kind, default, description in fields(CONFIGS[command]):
            if name.split(".")[0] == section:
                found.setdefault(name, {}).setdefault((kind, default, description), []).append(command)
    for name, ways in found.items():
        for (kind, default, description), commands in ways.items():
            told = "" if commands == users else ", ".join(commands)
            if "\n" in default:  # YAML writes a line's end as an empty line, which would end the row
                default = json.dumps(yaml.safe_load(default))
            cells = [f"`{name}`", kind, f"`{default}`" if default else "required", told, description]
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    print(page(), end="")
