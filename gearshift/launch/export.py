"""`gearshift export CHECKPOINT OUT`: a folder that `from_pretrained` loads, from the shards of any number of ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gearshift.engine.checkpoints.manifest import NAME, Manifest
from gearshift.errors import UserError
from gearshift.launch.arguments import Parser
from gearshift.launch.verify import newest_in


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the folder and returns 0."""
    parser = Parser(prog="gearshift export", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("checkpoint", type=Path, help="a step's folder; or a run's folder, for its newest step")
    parser.add_argument("out", type=Path, help="the folder to write: safetensors, config, tokenizer")
    parser.add_argument(
        "--adapter", action="store_true", help="the adapters alone (policy.lora), for peft; else they are merged"
    )
    parser.add_argument("--model", help="which model of the checkpoint (ppo: policy, the default, or critic)")
    parser.add_argument("--raw", action="store_true", help="the last weights, not their moving average (ppo.ema)")
    options = parser.parse_args(argv)
    if options.out.exists():
        raise UserError(f"{options.out} is there already: name a new folder")
    step = newest_in(options.checkpoint)
    name = _model(step, options.model)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from gearshift.engine.checkpoints.exporting import export, export_adapters

    (export_adapters if options.adapter else export)(step / name, options.out, options.raw)
    print(f"{options.out}: {name} of {step}")
    return 0


def _model(step: Path, asked: str | None) -> str:
    """The model to export: the one that was asked for, else the only one or the policy. Raises UserError."""
    folders = {name.split("/")[0] for name in Manifest.read(step).files if name.endswith("/config.json")}
    if asked is None and (len(folders) == 1 or "policy" in folders):
        return "policy" if "policy" in folders else folders.pop()
    if asked not in folders:
        raise UserError(f"--model: {asked} is not in {step / NAME}: it has {', '.join(sorted(folders))}")
    return asked
