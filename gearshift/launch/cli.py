"""`gearshift COMMAND ...`: finds the command's module, and turns a UserError into one line and exit code 2.

Nothing heavy is imported before a command needs it, so that help and mistakes answer at once.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from gearshift.errors import UserError

COMMANDS = {
    "demo": ("gearshift.launch.demo", "the whole pipeline on a toy world, in minutes; ends with a report"),
    "pretrain": ("gearshift.launch.pretrain", "a base model and tokenizer from text"),
    "sft": ("gearshift.launch.sft", "supervised fine-tuning on demonstrations"),
    "reward": ("gearshift.launch.reward", "a reward model from ranked completions"),
    "ppo": ("gearshift.launch.ppo", "PPO, and PPO-ptx with ptx.coef above 0"),
    "compare": ("gearshift.launch.compare", "systems side by side: scores, win rates, KL, loss on pretraining text"),
    "plan": ("gearshift.launch.plan", "memory of each rank in each phase, bytes of a shift, what fits; needs no GPU"),
    "bench": ("gearshift.launch.bench", "seconds, bytes and memory of a few iterations of PPO on these ranks"),
    "verify": ("gearshift.launch.verify", "is a checkpoint whole, and nothing in it but tensors"),
    "export": ("gearshift.launch.export", "a checkpoint as a folder that from_pretrained loads"),
    "doctor": ("gearshift.launch.doctor", "would a run start here, and over the hosts of a hostfile"),
    "report": ("gearshift.launch.report", "report.html and pictures of a run folder"),
}


def usage() -> str:
    lines = ["usage: gearshift COMMAND ...", ""]
    lines += [f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items()]
    lines += ["", "gearshift COMMAND --help lists every setting of a command, with its default and unit."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, or 2 after a mistake that one line explains."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from gearshift import __version__

        print(f"gearshift {__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        print(f"gearshift: {name} is not a command; {meant}Commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(COMMANDS[name][0]).main(rest) or 0)
    except UserError as error:
        print(f"gearshift {name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `gearshift ppo --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
