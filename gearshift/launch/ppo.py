"""`gearshift ppo CONFIG.yaml`: PPO and PPO-ptx."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gearshift.launch.launcher import run_command
from gearshift.rlhf.settings import PpoConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, or starts the processes that run it; returns the exit code."""
    return run_command("ppo", argv, _stage)


def _stage(config: PpoConfig) -> None:
    from gearshift.launch.reporter import run_stage
    from gearshift.rlhf.ppo import ppo

    run_stage("ppo", ppo, config)


if __name__ == "__main__":
    sys.exit(main())
