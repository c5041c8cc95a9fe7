"""A stage in one rank, from its start to its exit code; the rank that failed first is the only one that speaks."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from gearshift.errors import Paused, Told, UserError
from gearshift.launch.environment import prepare_environment
from gearshift.launch.overrides import Arguments
from gearshift.launch.processes import PAUSED, USER_ERROR

# Seconds. DeepSpeed's launcher looks once a second for a process that failed, and then ends the others.
LAUNCHER_POLL = 1.0
CRASH = 1


def run_rank(command: str, arguments: Arguments, stage: Callable[[Any], None]) -> NoReturn:
    """Runs the stage in this rank, which ends here."""
    prepare_environment()
    # DeepSpeed calls collectives by names that torch is renaming: nothing that a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    from gearshift.launch.joining import join

    rank = int(os.environ["RANK"])
    try:
        stage(join(command, arguments))
    except Told:
        _fail("", USER_ERROR, wait=0)
    except UserError as error:
        # An error of all ranks is told by rank 0; the others see meanwhile that it has been.
        _fail(f"gearshift {command}: {error}", USER_ERROR, wait=0 if rank == 0 else 3 * LAUNCHER_POLL)
    except Paused as paused:
        _fail(f"gearshift {command}: {paused}" if rank == 0 else "", PAUSED, wait=0, alone=False)
    except KeyboardInterrupt:
        _fail("", 128 + signal.SIGINT, wait=0)
    except Exception as error:
        _crash(error, rank)
    _leave(0)


def _crash(error: Exception, rank: int) -> NoReturn:
    """Often only "connection closed by peer", because another rank has failed: wait for that one to be found."""
    told = traceback.format_exc()
    from gearshift.engine import watchdog
    from gearshift.engine.endings import is_lost_connection, several_hosts

    if several_hosts():
        if is_lost_connection(error):
            watchdog.wait_for_verdict()
        _fail(told, CRASH, wait=0)
    # Longer than a rank waits that tells a mistake: its connections may be gone as soon as it has found it.
    _fail(told, CRASH, wait=(6 if rank == 0 else 9) * LAUNCHER_POLL)


def _fail(message: str, code: int, wait: float, alone: bool = True) -> NoReturn:
    """Ends this rank with `code`; `alone`: the others may not know yet that the run ends."""
    # Who waits here is ended by the launcher's SIGTERM; the run's own handler would only note it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not (message and alone and "torch" in sys.modules):
        time.sleep(wait)
        if message:
            print(message, file=sys.stderr)
        _leave(code)
    from gearshift.engine.endings import code_before, linger

    if (first := code_before(code, wait)) is not None:
        _leave(first)
    print(message, file=sys.stderr, flush=True)
    linger()
    _leave(code)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: tearing down a process group whose peers are busy can hang, and threads of gloo that are still there
    # at the interpreter's end have been seen to abort a run that was complete.
    os._exit(code)
