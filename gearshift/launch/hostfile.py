"""Which ranks run where: a hostfile, and what --include and --exclude leave of it, by DeepSpeed's rules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from gearshift.errors import UserError


def read_hostfile(path: str) -> dict[str, int]:
    """Slots of each host (`HOST slots=N` a line). Raises UserError naming file and line."""
    if not Path(path).is_file():
        raise UserError(f"--hostfile: there is no file {path} (relative to {Path.cwd()})")
    hosts: dict[str, int] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        line = line.split("#")[0].strip()
        match = re.match(r"^(\S+)\s+slots=([1-9]\d*)$", line)
        if line and not match:
            raise UserError(f"{path}:{number}: should read HOST slots=N, not {line!r}")
        if match and match[1] in hosts:
            raise UserError(f"{path}:{number}: names {match[1]} a second time: one line for each host")
        if match:
            hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"{path}: names no host: lines should read HOST slots=N")
    return hosts


def selected(hosts: Mapping[str, int], include: str = "", exclude: str = "") -> dict[str, list[int]]:
    """Slots of each host that run a rank: `HOST@HOST:0,2` names hosts or some slots of them. Raises UserError."""
    everything = {host: list(range(slots)) for host, slots in hosts.items()}
    option = "--include" if include else "--exclude"
    named = _named(include or exclude, everything, option)
    if include:
        chosen = {host: named[host] for host in everything if host in named}
    else:
        chosen = {host: [s for s in slots if s not in named.get(host, [])] for host, slots in everything.items()}
    chosen = {host: slots for host, slots in chosen.items() if slots}
    if not chosen:
        raise UserError(f"{option} {include or exclude}: leaves no slot of the hostfile")
    return chosen


def _named(text: str, everything: Mapping[str, list[int]], option: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for word in filter(None, text.split("@")):
        host, colon, slots = word.partition(":")
        if host not in everything:
            raise UserError(f"{option}: {host} is not in the hostfile: use some of {', '.join(everything)}")
        if colon and not re.fullmatch(r"\d+(,\d+)*", slots):
            raise UserError(f"{option}: {word!r} should read HOST or HOST:0,1")
        numbers = sorted({int(n) for n in slots.split(",")}) if colon else everything[host]
        missing = [n for n in numbers if n not in everything[host]]
        if missing:
            raise UserError(f"{option}: {host} has slots 0 to {len(everything[host]) - 1}, not {missing[0]}")
        found[host] = sorted({*found.get(host, []), *numbers})
    return found
