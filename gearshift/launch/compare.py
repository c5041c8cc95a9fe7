"""`gearshift compare CONFIG.yaml`: systems side by side on the same prompts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gearshift.launch.launcher import run_command
from gearshift.rlhf.settings import CompareConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, or starts the processes that run it; returns the exit code."""
    return run_command("compare", argv, _stage)


def _stage(config: CompareConfig) -> None:
    from gearshift.launch.reporter import run_stage
    from gearshift.rlhf.compare import compare

    run_stage("compare", compare, config)


if __name__ == "__main__":
    sys.exit(main())
