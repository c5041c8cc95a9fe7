"""What must be the same on every host: versions, and Gearshift's own files. No torch is imported here."""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path

import gearshift

# Ranks of different versions disagree on what they send each other, or on the ids of the same tokens.
COMPARED = ("torch", "deepspeed", "transformers", "accelerate", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Name -> version of Python (without its last number), Gearshift and `COMPARED`; without what is not installed."""
    found = {"Python": "{}.{}".format(*sys.version_info), "gearshift": gearshift.__version__}
    return found | {name: version for name in COMPARED if (version := installed(name)) is not None}


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def file_digests() -> dict[str, str]:
    """Path in the package -> the first 12 digits of the SHA-256 of each Python and C file."""
    root = Path(gearshift.__file__).parent
    files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".c", ".h"))
    return {str(path.relative_to(root)): file_digest(path) for path in files}


def file_digest(path: Path) -> str:
    """The first 12 digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
