"""A stage for the launcher's test: a crash (seed 2), a mistake that all find (3), or one that rank 1 alone finds."""

import sys
from pathlib import Path

from gearshift.errors import UserError
from gearshift.launch.launcher import run_command
from gearshift.rlhf.settings import PretrainConfig


def stage(config: PretrainConfig) -> None:
    if config.run.seed == 2:
        raise RuntimeError("a broken stage")
    import torch
    import torch.distributed as dist

    from gearshift.rlhf.signals import StopSignals

    StopSignals(Path(config.run.folder))  # as in a run that saves itself
    if config.run.seed == 3:
        raise UserError("no row at all")
    if dist.get_rank() == 1:
        raise UserError("rank 1 found an empty row")
    dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    sys.exit(run_command("pretrain", None, stage))
