"""`gearshift reward CONFIG.yaml`: a reward model from ranked completions."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gearshift.launch.launcher import run_command
from gearshift.rlhf.settings import RewardConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, or starts the processes that run it; returns the exit code."""
    return run_command("reward", argv, _stage)


def _stage(config: RewardConfig) -> None:
    from gearshift.launch.reporter import run_stage
    from gearshift.rlhf.reward import reward

    run_stage("reward", reward, config)


if __name__ == "__main__":
    sys.exit(main())
