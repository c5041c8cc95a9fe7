"""All operations, or those named, each in a process of its own: what one leaves in memory is not in another's peak.

python -m benchmarks.kernels [NAME ...] [options of the single ones; --out is a folder]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.kernels import OPERATIONS
from benchmarks.kernels.command import FOLDER, parser


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(OPERATIONS)}; none: all")
    options = arguments.parse_args()
    unknown = [name for name in options.names if name not in OPERATIONS]
    if unknown:
        arguments.error(f"no such operation: {unknown[0]}; there are {', '.join(OPERATIONS)}")
    folder = options.out or FOLDER
    failed = [name for name in options.names or OPERATIONS if not run(name, folder)]
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return 1 if failed else 0


def run(name: str, folder: Path) -> bool:
    words = [word for word in without_out(sys.argv[1:]) if word not in OPERATIONS]
    command = [sys.executable, "-m", f"benchmarks.kernels.{name}", *words, "--out", str(folder / f"{name}.json")]
    print(flush=True)
    return subprocess.run(command, check=False).returncode == 0


def without_out(words: list[str]) -> list[str]:
    kept = []
    skip = False
    for word in words:
        if not skip and word != "--out" and not word.startswith("--out="):
            kept.append(word)
        skip = word == "--out"
    return kept


if __name__ == "__main__":
    sys.exit(main())
