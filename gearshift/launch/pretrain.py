"""`gearshift pretrain CONFIG.yaml`: a base model (and tokenizer) from text."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gearshift.launch.launcher import run_command
from gearshift.rlhf.settings import PretrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, or starts the processes that run it; returns the exit code."""
    return run_command("pretrain", argv, _stage)


def _stage(config: PretrainConfig) -> None:
    from gearshift.launch.reporter import run_stage
    from gearshift.rlhf.language import pretrain

    run_stage("pretrain", pretrain, config)


if __name__ == "__main__":
    sys.exit(main())
