"""From a YAML file and overrides to a typed config, or to one line that says what is wrong and where.

`load` is all that a command needs. Relative paths in a config are relative to the current directory.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from gearshift.errors import SettingError, UserError, one_line
from gearshift.launch.checks import check
from gearshift.rlhf.settings import (
    BenchConfig,
    CompareConfig,
    Config,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
)

CONFIGS: dict[str, type[Config]] = {
    "pretrain": PretrainConfig,
    "sft": SftConfig,
    "reward": RewardConfig,
    "ppo": PpoConfig,
    "compare": CompareConfig,
    "bench": BenchConfig,
}

# Sections in help, whichever a command has.
ORDER = ["run", "policy", "critic", "reference", "reward", "systems", "data", "train", "rollout", "ppo", "ptx"]
ORDER += ["compare", "bench", "optimizer", "checkpoint", "tracking", "deepspeed"]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-5 as text; people who write it mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load(
    command: str,
    path: str | Path,
    overrides: Sequence[tuple[str, str]] = (),
    ranks: int | None = None,
) -> Config:
    """The config of `command` ("ppo" ...) from the file at `path`, with `("section.field", "value")` overrides.

    With `ranks` (processes that will run), settings are also checked against each other, the rank count and the
    files they name. Raises UserError: one line with file, line, `section.field`, what is wrong and what would be right.
    """
    source = _Source(Path(path))
    for key, text in overrides:
        source.override(key, _typed(text, _annotation(CONFIGS[command], key.split("."))))
    try:
        config = validate(command, source.values)
        if ranks is not None:
            check(config, ranks)
    except SettingError as error:
        raise UserError(f"{source.where(error.field)}: {error.field}: {error.problem}") from None
    return config


def read_values(path: str | Path) -> dict[str, Any]:
    """The sections of a YAML file as they are written. Raises UserError."""
    return _Source(Path(path)).values


def save(config: Config, path: str | Path) -> None:
    """Writes the config, defaults included, as YAML that `load` reads back."""
    Path(path).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def validate(command: str, values: dict[str, Any]) -> Config:
    """Types and ranges of every field. Raises SettingError for the first problem, unknown keys first."""
    # An empty section ("ptx:" with nothing under it) means its defaults.
    values = {key: {} if value is None else value for key, value in values.items()}
    config_class = CONFIGS[command]
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        # A misspelt key is often a missing one too: the misspelling is what to tell.
        problems = sorted(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", e["type"] == "missing"))
        raise _setting_error(config_class, cast("dict[str, Any]", problems[0])) from None


def _setting_error(config_class: type[Config], error: dict[str, Any]) -> SettingError:
    path = [str(part) for part in error["loc"]]
    context = error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        return SettingError(".".join(path), _unknown(config_class, path))
    if error["type"] == "owned":
        return SettingError(".".join([*path, context["field"]]), error["msg"])
    if error["type"] == "missing":
        return SettingError(".".join(path), f"missing: {describe(config_class, path) or 'a section that is needed'}")
    message = error["msg"]
    if error["type"] in ("model_type", "dict_type"):
        message = "should be a section (key: value pairs)"
    message = re.sub(r"^Input should be", "should be", message)
    return SettingError(".".join(path), f"{message}, not {error['input']!r}")


def _unknown(config_class: type[Config], path: list[str]) -> str:
    """`unknown setting; did you mean ...?`, from the neighbours first, then from all fields of the command."""
    known = [field for field, *_ in fields(config_class)]
    sections = list(config_class.model_fields)
    parent = path[:-1]
    elsewhere = [command for command, other in CONFIGS.items() if path[0] in other.model_fields]
    if not parent and elsewhere:
        return f"a section of {', '.join(elsewhere)}, not of this command, whose sections are {', '.join(sections)}"
    neighbours = sections if not parent else [f for f in known if f.split(".")[:-1] == parent]
    last = {name.split(".")[-1]: name for name in neighbours}
    close = [last[name] for name in difflib.get_close_matches(path[-1], last, n=1, cutoff=0.65)]
    close = close or [field for field in known if field.split(".")[-1] == path[-1]][:1]
    close = close or difflib.get_close_matches(".".join(path), known, n=1, cutoff=0.75)
    if close:
        return f"unknown setting; did you mean {close[0]}?"
    what = "sections of this command" if not parent else f"settings of {'.'.join(parent)}"
    return f"unknown setting; the {what} are {', '.join(name.split('.')[-1] for name in neighbours)}"


class _Source:
    """The values of a YAML file and of overrides, and where each was written."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: dict[str, int] = {}
        self.overridden: set[str] = set()
        self.values: dict[str, Any] = self._read()

    def where(self, field: str) -> str:
        """`file.yaml:12`, or that the command line said it."""
        parts = field.split(".")
        names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        if any(name in self.overridden for name in names):
            return "command line"
        line = next((self.lines[name] for name in names if name in self.lines), None)
        if line is None and any(key.startswith(f"{field}.") for key in self.overridden):
            return "command line"  # a section that the file does not have
        return f"{self.path}:{line}" if line else str(self.path)

    def override(self, key: str, value: Any) -> None:
        *sections, name = key.split(".")
        inner = self.values
        for section in sections:
            if inner.get(section) is None:
                inner[section] = {}
            inner = inner[section]
            if not isinstance(inner, dict):
                raise UserError(f"command line: {key}: {section} is a single value, it has no fields")
        inner[name] = value
        self.overridden.add(key)

    def _read(self) -> dict[str, Any]:
        if not self.path.is_file():
            raise UserError(f"{self.path}: there is no such config file (relative to {Path.cwd()})")
        try:
            text = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
        try:
            node = yaml.compose(text, _Loader)
            values = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            at = f":{mark.line + 1}" if mark else ""
            problem = getattr(error, "problem", None) or one_line(error)
            raise UserError(f"{self.path}{at}: not YAML: {problem}") from None
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise UserError(f"{self.path}: should hold sections (run:, policy:, data: ...), not {values!r:.60}")
        for key, line in _keys(node):
            if key in self.lines:
                raise UserError(f"{self.path}:{line}: {key}: set twice, first in line {self.lines[key]}")
            self.lines[key] = line
        return values


def _typed(text: str, annotation: Any) -> Any:
    """The value that an override's text stands for: YAML, except where the field is text.

    As YAML, "{prompt}" would be a mapping, a line's end a space, and what follows " #" a comment.
    """
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text
    optional = get_origin(annotation) in (Union, UnionType) and str in get_args(annotation)
    if annotation is not str and not optional:
        return value
    quoted = isinstance(value, str) and text.lstrip()[:1] in ("'", '"')
    return value if quoted or (optional and value is None) else text


def _annotation(section: Any, path: list[str]) -> Any:
    """The type of the field at `path` ("systems", "NAME", "prefix"); None for one that is not there."""
    if not path:
        return section
    if isinstance(section, type) and issubclass(section, BaseModel):
        info = section.model_fields.get(path[0])
        return _annotation(info.annotation, path[1:]) if info else None
    named = [argument for argument in get_args(section) if _inner(argument)]
    return _annotation(named[0], path[1:]) if named else None


def _keys(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        yield name, key.start_mark.line + 1
        yield from _keys(value, f"{name}.")


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation names, if it names one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(name, type, default or "", description) of every field, sections opened."""
    for name, info in section.model_fields.items():
        inner = _inner(info.annotation)
        if inner:
            yield from fields(inner, f"{prefix}{name}.")
            continue
        named = [a for a in get_args(info.annotation) if _inner(a)]
        if named:  # a section that may be left out, such as policy.lora; or a dictionary of them, such as systems
            between = "NAME." if get_origin(info.annotation) is dict else ""
            yield from fields(named[0], f"{prefix}{name}.{between}")
            continue
        default = "" if info.is_required() else _yaml(info.get_default(call_default_factory=True))
        yield f"{prefix}{name}", _type_name(info.annotation), default, info.description or ""


def describe(config_class: type[Config], path: list[str]) -> str | None:
    """What the field at `path` is, from its description."""
    name = ".".join(path)
    return next((description for field, _, _, description in fields(config_class) if field == name), None)


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("...").strip()


def _type_name(annotation: Any) -> str:
    text = str(annotation) if get_args(annotation) else getattr(annotation, "__name__", str(annotation))
    text = re.sub(r"typing\.Optional\[(.*)\]", r"\1", text)
    text = re.sub(r"typing\.Union\[(.*)\]", lambda m: m[1].replace(", ", " | ", 1), text)
    text = re.sub(r"typing\.(Literal\[(.*?)\])", lambda m: m[2].replace("'", "").replace(", ", "|"), text)
    return text.replace(" | None", "").replace("typing.Any", "any").replace("dict[str, any]", "mapping")


def _usage(command: str) -> str:
    config, own = "CONFIG.yaml", ""
    if command == "bench":
        config, own = "[CONFIG.yaml]", " [--model FOLDER] [--iterations N] [--out FILE]"
    elif "checkpoint" in CONFIGS[command].model_fields:
        own = " [--resume auto|PATH|never] [--max-restarts N] [--profile]"
    return (
        f"usage: gearshift {command} {config} [--section.field value ...] [--master_port PORT] [--hostfile HOSTS"
        " [--include|--exclude HOST[:SLOTS]@...] [--launcher pdsh|openmpi|slurm] [--launcher_args=ARGS]"
        f" [--master_addr ADDRESS] [--ssh_port PORT] [--venv_script FILE]]{own}"
    )


def help_text(command: str) -> str:
    """Usage, and one entry per field: name, type, default, what it is and its unit."""
    config_class = CONFIGS[command]
    lines = [
        _usage(command),
        "",
        inspect.cleandoc(config_class.__doc__ or ""),
        "CONFIG.yaml holds the sections below; each field can also be set as --section.field value.",
        "Relative paths are relative to the current directory.",
    ]
    section = None
    for name, kind, default, description in sorted(fields(config_class), key=lambda f: ORDER.index(f[0].split(".")[0])):
        if name.split(".")[0] != section:
            section = name.split(".")[0]
            lines += ["", f"{section}:"]
        shown = f"default {default}" if default else "required"
        lines += [f"  --{name} {kind} ({shown})", f"      {description}"]
    return "\n".join(lines)
