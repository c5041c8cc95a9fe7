"""`gearshift report RUN`: choose what a folder is, and make the page for it."""

from collections.abc import Sequence
from pathlib import Path

from gearshift.errors import UserError
from gearshift.launch.arguments import Parser
from gearshift.launch.report.material import STAGES, Material, read_compare, read_run, read_stages

DEMO_FOLDERS = ("pretrain", "sft", "reward", "ppo", "ppo-ptx", "compare")


def main(argv: Sequence[str] | None = None) -> int:
    """Write RUN/report.html and RUN/report/*.png, and print where the page is.

    Raises UserError when the folder is missing or holds nothing to report.
    """
    parser = Parser(prog="gearshift report", description="Write report.html and its pictures into a run folder.")
    parser.add_argument(
        "run",
        metavar="RUN",
        type=Path,
        help="a run folder (metrics.jsonl), a compare folder (systems.json), or a folder of stages (pretrain, sft, …)",
    )
    print(folder_report(parser.parse_args(argv).run))
    return 0


def demo_report(folder: str | Path) -> Path:
    """Write the report of a whole demo and return the path of report.html.

    folder: holds the run folders pretrain, sft, reward, ppo, ppo-ptx and the folder compare; checks.json, timings.json
    and world/about.json are shown if they are there. Raises UserError naming the first folder that is missing.
    """
    folder = _existing(Path(folder))
    for name in DEMO_FOLDERS:
        if not (folder / name).is_dir():
            raise UserError(f"{folder / name}: no such folder; a demo report needs {', '.join(DEMO_FOLDERS)}")
    return _write(read_stages(folder))


def folder_report(folder: str | Path) -> Path:
    """Write the report of one run, one comparison, or of whatever stages a folder holds; return the page's path."""
    folder = _existing(Path(folder))
    if (folder / "systems.json").is_file():  # first: a comparison logs metrics too
        return _write(read_compare(folder))
    if (folder / "metrics.jsonl").is_file():
        return _write(read_run(folder))
    if any((folder / name).is_dir() for name in (*STAGES, "compare")):
        return _write(read_stages(folder))
    raise UserError(
        f"{folder}: nothing to report: no metrics.jsonl, no systems.json and none of the folders "
        f"{', '.join((*STAGES, 'compare'))}"
    )


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    return folder


def _write(material: Material) -> Path:
    # Imported here: matplotlib takes half a second that `gearshift --help` should not spend.
    from gearshift.launch.report.page import write_report

    return write_report(material)
