"""`gearshift sft CONFIG.yaml`: supervised fine-tuning on demonstrations."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gearshift.launch.launcher import run_command
from gearshift.rlhf.settings import SftConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, or starts the processes that run it; returns the exit code."""
    return run_command("sft", argv, _stage)


def _stage(config: SftConfig) -> None:
    from gearshift.launch.reporter import run_stage
    from gearshift.rlhf.language import sft

    run_stage("sft", sft, config)


if __name__ == "__main__":
    sys.exit(main())
