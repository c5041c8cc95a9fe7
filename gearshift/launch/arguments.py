"""The arguments of Gearshift's commands that take no config."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """What is wrong is told in one line; how the command is used is what its --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (what there is: {self.prog} --help)\n")
