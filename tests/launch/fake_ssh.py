"""An `ssh` to put on PATH: every host is this machine, but `gone`, which refuses, and `bare`, which has no Python;
the shell of `chatty` prints a line. Beside it a `pdsh` that is only looked for."""

from __future__ import annotations

from pathlib import Path

SCRIPT = """#!/bin/sh
while :; do
    case "$1" in
        -o | -p | -l) shift 2 ;;
        -*) shift ;;
        *) break ;;
    esac
done
host=$1; shift
case "$host" in
    gone) echo "ssh: connect to host gone port 22: Connection refused" >&2; exit 255 ;;
    bare) echo "sh: 1: exec: python: not found" >&2; exit 127 ;;
    chatty) echo "Welcome" ;;
esac
exec sh -c "$*"
"""


def write(folder: Path) -> Path:
    """The folder to put first on PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, script in (("ssh", SCRIPT), ("pdsh", "#!/bin/sh\nexit 1\n")):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return folder
