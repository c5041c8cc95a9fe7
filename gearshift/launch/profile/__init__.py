"""`--profile`: a trace of one iteration of any stage, and a table of where its time goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gearshift.rlhf.reporting import Report
from gearshift.rlhf.settings import Config, PpoConfig, PretrainConfig

if TYPE_CHECKING:
    from gearshift.launch.profile.recorder import Recorder

PAGE = "profile.md"


@contextmanager
def profiled(command: str, config: Config, report: Report) -> Iterator[None]:
    """Around a stage in this rank, which profiles itself where `run.profile` says so."""
    if not isinstance(config, PretrainConfig | PpoConfig) or not config.run.profile.iterations:
        yield
        return
    from gearshift.engine import init_distributed, spans
    from gearshift.launch.profile.recorder import Recorder
    from gearshift.rlhf.setup import dtype_of

    world, folder = init_distributed(), Path(config.run.folder)
    unit = "iteration" if command == "ppo" else "step"
    recorder = Recorder(
        config.run.profile,
        unit,
        world,
        dtype_of(config.run, world),
        lambda recorder: write(command, folder, recorder, report),
    )
    with spans.listening(recorder):
        yield
    if told := missing(recorder):
        report.say(told)
    if recorder.steps and len(recorder.steps) < config.run.profile.iterations:
        write(command, folder, recorder, report)


def missing(recorder: Recorder) -> str:
    """What to say when the run had fewer steps than were to be profiled; else nothing."""
    wanted, after, got = recorder.settings.iterations, recorder.settings.after, len(recorder.steps)
    if got == wanted:
        return ""
    what = f"{got} of {wanted} {recorder.unit}s were" if got else "nothing was"
    had = f"{recorder.came} {recorder.unit}{'s' * (recorder.came != 1)}"
    ahead = f"run.profile.after lets {after} go by first, to warm up"
    return f"run.profile: {what} profiled: this start had {had}, and {ahead}"


def write(command: str, folder: Path, recorder: Recorder, report: Report) -> None:
    """The trace of every rank, and rank 0's page. Raises UserError where the disk refuses."""
    from gearshift.engine import watchdog
    from gearshift.launch.profile.page import Facts, page
    from gearshift.launch.profile.trace import ranges, read_events

    with watchdog.phase("writing the profile"):
        trace = recorder.write_trace(folder)
        if not recorder.world.is_main:
            return
        assert recorder.peaks is not None
        names = [recorder.unit, *(name for name in recorder.work if name != recorder.unit)]
        facts = Facts(
            command,
            recorder.unit,
            recorder.steps,
            recorder.seconds,
            recorder.before,
            recorder.world.size,
            device_name(recorder.world.device),
        )
        text = page(facts, ranges(read_events(trace), names), recorder.work, recorder.peaks)
        (folder / PAGE).write_text(text, encoding="utf-8")
        report.say(f"profile      {folder / PAGE} says where the time goes; {trace.parent}/ holds a trace of each rank")


def device_name(device: object) -> str:
    import torch

    return torch.cuda.get_device_name() if getattr(device, "type", "cpu") == "cuda" else "the CPU"
