"""`gearshift bench [CONFIG.yaml]`: a few iterations of PPO on these ranks, timed, and what they moved and held."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gearshift.launch.launcher import run_command
from gearshift.launch.overrides import Short
from gearshift.rlhf.settings import BenchConfig

RANDOM = Path(__file__).with_name("bench.yaml")
SHORT: Short = {
    "model": [("policy.init", None), ("policy.config", "null")],
    "iterations": [("bench.iterations", None)],
    "out": [("bench.out", None)],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, or starts the processes that run it; returns the exit code."""
    return run_command("bench", argv, _stage, short=SHORT, default_config=RANDOM)


def _stage(config: BenchConfig) -> None:
    from gearshift.launch.bench_table import summary, table
    from gearshift.launch.reporter import Spoken
    from gearshift.rlhf.bench import as_measured, bench

    config = as_measured(config)
    found = bench(config, Spoken(config))
    if os.environ["RANK"] != "0":
        return
    found["summary"] = summary(found)
    print("\n".join(table(found)), flush=True)
    if config.bench.out is not None:
        Path(config.bench.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
