"""A probe on another host, reached as DeepSpeed's launcher reaches it: by ssh, without a password."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from types import TracebackType
from typing import Any, Self

from gearshift.launch.doctor.probe import MARK
from gearshift.launch.hosts import ssh_words

ANSWER_SECONDS = 90.0


class Unreachable(Exception):
    """The host gave no answer: `code` is ssh's exit code (255: no connection), the message what ssh said last."""

    def __init__(self, code: int | None, message: str):
        super().__init__(message)
        self.code = code


def _command() -> str:
    """The probe by the same interpreter in the same folder with the same PYTHON... variables as a rank."""
    exports = [f"{name}={shlex.quote(value)}" for name, value in os.environ.items() if name.startswith("PYTHON")]
    python = [shlex.quote(sys.executable), "-m", "gearshift.launch.doctor.probe"]
    return " ".join(["cd", shlex.quote(os.getcwd()), "&&", "exec", "env", *exports, *python])


class Session:
    """Ask one thing at a time; ends with the `with` block."""

    def __init__(self, host: str, ssh_port: str | None):
        self.printed: list[str] = []  # what the host's login shell says before any command runs
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            ssh_words(host, ssh_port, _command()), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip

    def ask(self, what: str, **more: Any) -> Any:
        """The answer. Raises Unreachable after `ANSWER_SECONDS`, or when the other end is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(ANSWER_SECONDS, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps({"ask": what, **more}) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith(MARK):
                    return json.loads(line.removeprefix(MARK))
                self.printed.append(line.strip())
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
        code = self._process.wait()
        raise Unreachable(code, self._last_words() or f"no answer within {ANSWER_SECONDS:.0f} s")

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return lines[-1] if lines else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._process.communicate(timeout=5)  # its input ends, and so does it
        except (subprocess.TimeoutExpired, OSError):
            self._process.kill()
            self._process.wait()
        self._errors.close()
