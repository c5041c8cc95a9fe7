"""Versions of what is installed, compilers, and the extensions that they make. No torch is imported here."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from gearshift.launch.doctor.findings import Finding, note, ok, wrong
from gearshift.launch.environment import search_path
from gearshift.launch.installed import file_digests, installed
from gearshift.launch.installed import versions as installed_versions

# What an optional package is for, by the extra that brings it.
EXTRAS = {
    "flash": "flash attention on GPUs (rollout.attention: flash)",
    "lora": "adapters (policy.lora)",
    "track": "a dashboard (tracking.trackers)",
}
PYTHON = (3, 11)
# Seconds. No build of DeepSpeed's extensions takes as long: a lock that is older was left by one that was killed.
STALE = 1800.0


def versions() -> dict[str, str]:
    """What every host must have alike, all of Gearshift's own files as one digest."""
    code = hashlib.sha256(json.dumps(file_digests()).encode()).hexdigest()[:12]
    return installed_versions() | {"code of gearshift": code}


def python_finding(version: tuple[int, ...], executable: str) -> Finding:
    found = f"{'.'.join(map(str, version[:3]))} ({executable})"
    if version >= PYTHON:
        return ok("python", found)
    return wrong("python", found, f"Gearshift needs {'.'.join(map(str, PYTHON))} or newer")


def package_findings() -> Iterator[Finding]:
    """Of every package that Gearshift's own metadata names, but those for its tests."""
    try:
        requirements = importlib.metadata.requires("gearshift") or []
    except importlib.metadata.PackageNotFoundError:
        yield note("gearshift", "is not installed, its folder is on the path", "pip install -e . checks versions")
        return
    from packaging.requirements import Requirement

    for text in requirements:
        requirement = Requirement(text)
        extra = re.search(r"extra == [\"'](\w+)[\"']", text)
        if extra and extra[1] not in EXTRAS:
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": extra[1] if extra else ""}):
            continue
        version = installed(requirement.name)
        yield package_finding(requirement, version, extra[1] if extra else None)


def package_finding(requirement: object, version: str | None, extra: str | None) -> Finding:
    """`requirement`: a `packaging` Requirement; `extra`: the option that brings it, of one that is optional."""
    from packaging.requirements import Requirement

    assert isinstance(requirement, Requirement)
    name, wanted = requirement.name, f"{requirement.name}{requirement.specifier}"
    if version is not None and requirement.specifier.contains(version, prereleases=True):
        return ok(name, version)
    if extra is None:
        found = "is not installed" if version is None else f"{version} is not {requirement.specifier}"
        return wrong(name, found, f'pip install "{wanted}"')
    if version is None:
        return note(name, "is not installed", f'only for {EXTRAS[extra]}: pip install "gearshift[{extra}]"')
    return note(name, f"{version} is not {requirement.specifier}", f'{EXTRAS[extra]} needs it: pip install "{wanted}"')


def compiler_findings(gpus: bool) -> Iterator[Finding]:
    """What DeepSpeed's extensions and Gearshift's own library are compiled with."""
    # As at the start of a run (`prepare_environment`).
    path = search_path()
    for what, names, use in [
        (
            "C++ compiler",
            [os.environ.get("CXX", "c++"), "g++"],
            "DeepSpeed's extensions are built with it",
        ),
        (
            "C compiler",
            [os.environ.get("CC", "cc"), "gcc"],
            "builds Gearshift's library for the CPU (pip install): without it all there is slower",
        ),
        ("ninja", ["ninja"], "DeepSpeed's extensions are built with it: pip install ninja"),
    ]:
        found = next((where for name in names if (where := shutil.which(name, path=path))), None)
        yield ok(what, found) if found else note(what, "none found", use)
    nvcc = shutil.which("nvcc", path=path) or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin")
    if gpus:
        use = "only for DeepSpeed's own CUDA extensions (optimizer offload): install CUDA's toolkit, set CUDA_HOME"
        yield ok("nvcc", nvcc) if nvcc else note("nvcc", "none found", use)


def lock_findings() -> Iterator[Finding]:
    """Of builds of DeepSpeed's extensions, which torch compiles when they are first asked for."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    for lock in folder.glob("**/lock"):
        yield lock_finding(lock, time.time() - lock.stat().st_mtime)


def lock_finding(lock: Path, age: float) -> Finding:
    """torch's lock of a build, `age` seconds old."""
    if age < STALE:
        return note("build lock", f"{lock} is {age:.0f} s old", "something is being compiled: let it end")
    found = f"{lock} is {age / 3600:.1f} hours old, of a build that was killed"
    return wrong("build lock", found, "what needs that extension waits for it without end: remove it")
