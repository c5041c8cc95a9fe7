"""The command line of a stage: a config file, `--section.field value` overrides, and a few options of the launcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gearshift.errors import UserError

# Options of DeepSpeed's launcher that go on to it as they are.
LAUNCHER = ("include", "exclude", "master_addr", "master_port", "launcher", "launcher_args", "ssh_port", "venv_script")

# Option -> the settings that it stands for, and what they are set to (None: the option's value).
Short = Mapping[str, Sequence[tuple[str, str | None]]]
RESUME: Short = {"resume": [("checkpoint.resume", None)]}


@dataclass
class Arguments:
    """What was typed after the command's name."""

    config: str | None = None
    overrides: list[tuple[str, str]] = field(default_factory=list)  # ("ppo.clip", "0.1"), in order
    hostfile: str | None = None
    launcher: dict[str, str] = field(default_factory=dict)  # some of LAUNCHER
    max_restarts: int = 0
    help: bool = False


def parse_arguments(argv: list[str], short: Short = RESUME) -> Arguments:
    """Reads `CONFIG | --config CONFIG`, `--section.field value`, `--section.field=value`, `--hostfile FILE`, the
    options `short` (by default `--resume auto|PATH|never`), `--profile` (run.profile.iterations 1),
    `--max-restarts N`, `--help`, and `LAUNCHER`.

    `--local_rank=N`, which DeepSpeed's launcher adds for every process, is accepted and ignored.
    Raises UserError for anything else.
    """
    arguments = Arguments()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            arguments.help = True
        elif word == "--profile":
            arguments.overrides.append(("run.profile.iterations", "1"))
        elif not word.startswith("--"):
            _set_config(arguments, word)
        else:
            name, _, value = word[2:].partition("=")
            if "=" not in word:
                # A negative number is a value; the next option is not.
                if not rest or rest[0].startswith("--"):
                    raise UserError(f"{word} needs a value: {word} VALUE (or {word}=VALUE where it begins with --)")
                value = rest.pop(0)
            _set_option(arguments, name, value, short)
    check_launcher(arguments)
    return arguments


def _set_config(arguments: Arguments, path: str) -> None:
    if arguments.config is not None:
        raise UserError(
            f"two config files, {arguments.config} and {path}: give one, and changes as --section.field value"
        )
    arguments.config = path


def _set_option(arguments: Arguments, name: str, value: str, short: Short) -> None:
    plain = name.replace("-", "_")
    if name == "config":
        _set_config(arguments, value)
    elif name in short:
        arguments.overrides += [(key, value if given is None else given) for key, given in short[name]]
    elif name == "hostfile":
        arguments.hostfile = value
    elif plain == "max_restarts":
        if not value.isdigit():
            raise UserError(f"--{name}: should be a number of restarts, 0 or more, not {value!r}")
        arguments.max_restarts = int(value)
    elif plain == "local_rank":
        pass
    elif plain in LAUNCHER:
        arguments.launcher[plain] = value
    elif "." in name:
        arguments.overrides.append((name, value))
    else:
        raise UserError(f"--{name} is not an option: settings are --section.field value, see --help for all of them")


def check_launcher(arguments: Arguments) -> None:
    """Raises UserError for options of the launcher that cannot be, or not together."""
    given = arguments.launcher
    alone = [name for name in given if name != "master_port"]
    if alone and arguments.hostfile is None:
        raise UserError(f"--{alone[0]} is for several hosts: give --hostfile HOSTS with it")
    if "include" in given and "exclude" in given:
        raise UserError("--include and --exclude: give one of them")
    for name in ("master_port", "ssh_port"):
        if name in given and not (given[name].isdigit() and 0 < int(given[name]) < 65536):
            raise UserError(f"--{name}: should be a port, 1 to 65535, not {given[name]!r}")
